"""A Redis server for the tests of this folder."""

from collections.abc import Iterator

import pytest
from redis_server import RedisServer, redis_server


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server that all tests share: none changes its settings, and each has clients of its own."""
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server that the test may do to what it likes."""
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server
