"""Fixtures for all tests: above all, that none leaves anything behind."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from twisted.internet import reactor as _reactor
from twisted.logger import LogLevel, globalLogPublisher

reactor: Any = _reactor

# How long an example takes depends on what else the machine does.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a delayed call or an open socket behind, or a Deferred with an unhandled error."""
    calls = set(reactor.getDelayedCalls())
    selectables = _selectables()
    unhandled: list[str] = []

    def observe(event: dict[str, Any]) -> None:
        if event.get("log_level") is LogLevel.critical and "log_failure" in event:
            unhandled.append(str(event["log_failure"]))

    globalLogPublisher.addObserver(observe)
    gc.freeze()  # so that what is looked through below is what the test has made, and not all the modules
    yield
    gc.collect()
    globalLogPublisher.removeObserver(observe)
    left = [str(call) for call in reactor.getDelayedCalls() if call not in calls and call.active()]
    for call in reactor.getDelayedCalls():
        if call not in calls and call.active():
            call.cancel()
    left += [repr(selectable) for selectable in _selectables() - selectables]
    assert not left, f"left in the reactor: {left}"
    if not request.node.get_closest_marker("expects_logged_failure"):
        assert not unhandled, f"failures that nobody handled: {unhandled}"


def _selectables() -> set[Any]:
    internal = getattr(reactor, "_internalReaders", set())
    return {found for found in [*reactor.getReaders(), *reactor.getWriters()] if found not in internal}
