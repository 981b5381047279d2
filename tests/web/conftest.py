"""A site on a clock, with a pipeline in memory."""

import pytest
from surface import Surface, make_surface


@pytest.fixture
def surface() -> Surface:
    return make_surface()
