"""Runs a command under Twisted's reactor, from its start to its end."""

import signal
from collections.abc import Callable, Coroutine
from contextlib import suppress
from types import FrameType
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import react
from twisted.python.failure import Failure

from ai_ticket.cli.outcome import ExitStatus


def run(command: Callable[[Any], Coroutine[Any, Any, ExitStatus]]) -> int:
    """Run it with the reactor, and give its exit status or raise what it raises.

    SIGINT and SIGTERM cancel it, so that it can tidy up; the status is then the one that a shell gives for the signal.
    """
    results: list[ExitStatus | Failure] = []
    signals: list[int] = []

    def main(reactor: Any) -> Deferred[None]:
        finished = Deferred.fromCoroutine(command(reactor))

        def interrupt(number: int, frame: FrameType | None) -> None:
            signals.append(number)
            reactor.callFromThread(finished.cancel)

        def take_over_signals() -> None:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, interrupt)

        reactor.callWhenRunning(take_over_signals)  # no sooner: as it starts, the reactor puts its own handlers there
        return finished.addBoth(results.append)  # a failure is for our caller, where react() would only log it

    with suppress(SystemExit):  # that is how it ends, always
        react(main)
    if signals:
        return 128 + signals[0]
    [result] = results
    if isinstance(result, Failure):
        result.raiseException()
    return result
