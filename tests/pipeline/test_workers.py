"""Cooperative workers."""

import pytest
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock

from ai_ticket.pipeline.workers import Workers


def test_one_thing_after_the_other_until_there_is_nothing_to_do() -> None:
    clock = Clock()
    work: list[Deferred[None]] = [Deferred(), succeed(None), Deferred()]
    begun: list[Deferred[None]] = []

    def begin() -> Deferred[None] | None:
        if not work:
            return None
        begun.append(work.pop(0))
        return begun[-1]

    workers = Workers(clock, begin)
    workers.call()
    assert not begun, "not before the reactor's next turn"
    clock.advance(0)
    assert (len(begun), len(workers)) == (1, 1)
    assert not clock.getDelayedCalls(), "who waits costs nothing"
    begun[0].callback(None)
    assert len(begun) == 1
    clock.advance(0)
    assert len(begun) == 3
    begun[2].callback(None)
    clock.advance(0)
    assert len(workers) == 0
    assert not clock.getDelayedCalls()


@pytest.mark.expects_logged_failure
def test_one_that_fails_takes_no_other_along() -> None:
    clock = Clock()
    waits: Deferred[None] = Deferred()
    work = [waits, None]

    def begin() -> Deferred[None] | None:
        if len(work) == 1:
            work.clear()
            raise RuntimeError("a bug")
        return work.pop(0) if work else None

    workers = Workers(clock, begin)
    workers.call()
    workers.call()
    clock.advance(0)
    assert (len(workers), work) == (1, [])
    waits.callback(None)
    clock.advance(0)
    assert len(workers) == 0


def test_the_end() -> None:
    clock = Clock()
    waits: Deferred[None] = Deferred()
    begun: list[Deferred[None]] = []
    workers = Workers(clock, lambda: begun.append(waits) or waits)
    workers.call()
    clock.advance(0)
    workers.call()
    workers.stop()
    assert not clock.getDelayedCalls()
    waits.callback(None)
    clock.advance(0)
    assert begun == [waits]
    assert not clock.getDelayedCalls()
