"""A site on a clock, with a pipeline in memory; and no garbage collector."""

import gc
from collections.abc import Iterator

import pytest
from surface import Surface, make_surface


@pytest.fixture
def surface() -> Surface:
    return make_surface()


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Until the test asks for it, no cycle of objects that know each other is freed."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
