"""HTTP/2: what a stream takes of memory, and that it gives it back when it is over, whatever became of it."""

import gc
from collections.abc import Callable, Iterator

import pytest
from frames import DATA, END_STREAM, GET, POST, RST_STREAM, Fields, RawClient, frame, head, settings
from surface import Surface
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure

METRICS: Fields = [GET[0], (b":path", b"/metrics"), *GET[2:]]
MISSING: Fields = [GET[0], (b":path", b"/nope"), *GET[2:]]
STRANGER: Fields = [field for field in POST if field[0] != b"authorization"]
SHORT: Fields = [*POST, (b"content-length", b"1")]


def lose(client: RawClient) -> None:
    client.connection.connectionLost(Failure(ConnectionDone()))
    client.transport.unregisterProducer()  # as real ones do


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Until the test asks for it, no cycle of objects that know each other is freed."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def reset(stream: int) -> bytes:
    return frame(RST_STREAM, 0, stream, bytes(4))


def body(stream: int, data: bytes) -> bytes:
    return frame(DATA, END_STREAM, stream, data)


@pytest.mark.parametrize(
    "request_of",
    [
        head,
        lambda stream: head(stream, METRICS),
        lambda stream: head(stream, MISSING),
        lambda stream: head(stream, STRANGER),
        lambda stream: head(stream, POST, ends=False) + body(stream, b'{"content":"x"}'),
        lambda stream: head(stream, POST, ends=False) + body(stream, b"{"),
        lambda stream: head(stream, SHORT, ends=False) + body(stream, b"{}"),
        lambda stream: head(stream, POST, ends=False) + reset(stream),
        lambda stream: head(stream, SHORT),
    ],
)
@pytest.mark.usefixtures("no_collector")
def test_a_stream_that_is_over_needs_no_collector(surface: Surface, request_of: Callable[[int], bytes]) -> None:
    client = RawClient(surface)
    client.send(request_of(1))
    gc.collect()
    for stream in range(3, 43, 2):
        client.send(request_of(stream))
    assert gc.collect() == 0
    lose(client)


@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.usefixtures("no_collector")
def test_a_connection_that_is_lost_needs_no_collector(surface: Surface, answered: bool) -> None:
    """With all of its streams waiting, for the caller's windows or for a backend."""
    surface.pipeline.answer = lambda: Deferred()
    gc.collect()
    for _ in range(3):
        client = RawClient(surface)
        client.send(settings(initial_window_size=0))
        for stream in range(1, 41, 2):
            waiting = head(stream, POST, ends=False) + body(stream, b'{"content":"x"}')
            client.send(head(stream, METRICS) if answered else waiting)
        lose(client)
        surface.pipeline.jobs.clear()
    del client
    assert gc.collect() == 0
