"""Keeps events away from a backend that fails, and finds out by itself when it no longer does."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from automat import TypeMachineBuilder
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

CONSECUTIVE_FAILURES = 5
RATE_WINDOW = 20  # attempts
RATE_LEAST = 10  # attempts, below which no rate is judged
RATE_LIMIT = 0.5  # of them failing
FIRST_BACK_OFF = 1.0  # seconds, doubled at each further opening without a success in between
LONGEST_BACK_OFF = 30.0

_log = Logger()


class CircuitState(IntEnum):
    """The values of the metric."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


_CLOSED, _HALF_OPEN, _OPEN = CircuitState
# Names of our own: Python 3.11 takes ten times as long to find a member in its enum.


class Circuit:
    """A backend's circuit. What is let through by `enter` ends in one of `succeeded`, `failed` or `abandoned`.

    Closed, it lets everything through; it opens after five failures in a row, or where half of the last twenty
    attempts failed. Open, it lets nothing through until a back-off with jitter is over. Then it is half-open: it lets a
    single trial through, whose success closes it and whose failure opens it again, for twice as long.

    It has no timer: that a back-off is over shows when somebody asks.
    """

    def __init__(self, name: str, clock: IReactorTime, random: Callable[[], float]):
        """@param name: the backend's, for the log. @param random: a number from 0 to 1, for the jitter."""
        self._core = _Core(name, clock, random)
        self._machine = _make_machine(self._core)

    @property
    def state(self) -> CircuitState:
        """Whether it is closed, half-open or open now."""
        if self._core.state is _OPEN:
            self._cool()
        return self._core.state

    @property
    def closed_until(self) -> float:
        """The clock's time before which nothing is let through; while a trial is under way, nobody knows."""
        return self._core.until if self.state is _OPEN else 0.0

    def lets_through(self) -> bool:
        """Whether `enter` may be called."""
        if self._core.state is _OPEN:
            self._cool()
        return self._core.lets_through

    def enter(self) -> int:
        """Let something through.

        @return: a ticket to show when it has ended. What began before the circuit last changed proves nothing any more.
        """
        if self.state is not _CLOSED:
            self._machine.enter()
        return self._core.epoch

    # Closed, attempts are counted, and change nothing: the machine, which takes ten times as long, need not know.

    def succeeded(self, ticket: int) -> None:
        """What was let through has ended well."""
        if ticket != self._core.epoch:
            return
        if self._core.state is _CLOSED:
            self._core.record(True)
        else:
            self._machine.succeeded()

    def failed(self, ticket: int) -> None:
        """The backend failed it."""
        if ticket != self._core.epoch:
            return
        if self._core.state is not _CLOSED:
            self._machine.failed()
            return
        self._core.record(False)
        if self._core.too_many_failures():
            self._machine.trip()

    def abandoned(self, ticket: int) -> None:
        """It ended in a way that says nothing about the backend, such as by its caller's leaving."""
        if ticket == self._core.epoch and self._core.state is not _CLOSED:
            self._machine.abandoned()

    def found_down(self) -> None:
        """A health probe failed: with the last attempt having failed as well, that is proof enough."""
        if self._core.row_of_failures:
            self._machine.trip()

    def found_up(self) -> None:
        """A backend that could not be reached can be again: the trial need not wait."""
        self._machine.cool()

    def _cool(self) -> None:
        if self._core.clock.seconds() >= self._core.until:
            self._machine.cool()


@dataclass
class _Core:
    """What the states share. `state` and `lets_through` say which it is to those who ask, for each event several times:
    asking the machine itself takes ten times as long.
    """

    name: str
    clock: IReactorTime
    random: Callable[[], float]

    state: CircuitState = _CLOSED
    lets_through: bool = True
    epoch: int = 0
    openings: int = 0
    until: float = 0.0
    row_of_failures: int = 0
    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=RATE_WINDOW))

    def record(self, success: bool) -> None:
        self.row_of_failures = 0 if success else self.row_of_failures + 1
        self.recent.append(success)

    def too_many_failures(self) -> bool:
        if self.row_of_failures >= CONSECUTIVE_FAILURES:
            return True
        failures = self.recent.count(False)
        return len(self.recent) >= RATE_LEAST and failures >= RATE_LIMIT * len(self.recent)

    def become(self, state: CircuitState, *, lets_through: bool) -> None:
        """Begin anew in a state."""
        self.state = state
        self.lets_through = lets_through
        self.epoch += 1
        self.row_of_failures = 0
        self.recent.clear()


class _Events(Protocol):
    """What can change a circuit."""

    def enter(self) -> None:
        """The trial is let through."""

    def succeeded(self) -> None:
        """It succeeded."""

    def failed(self) -> None:
        """It failed."""

    def abandoned(self) -> None:
        """It ended without proving anything."""

    def trip(self) -> None:
        """There is reason enough to open."""

    def cool(self) -> None:
        """There is reason enough for a trial."""


def _build() -> Callable[[_Core], _Events]:
    builder = TypeMachineBuilder(_Events, _Core)
    closed = builder.state("closed")
    open_ = builder.state("open")
    half_open = builder.state("half-open")
    trying = builder.state("trying")  # half-open as well, but with its one trial under way

    @closed.upon(_Events.trip).to(open_)
    @trying.upon(_Events.failed).to(open_)
    def open_up(machine: _Events, core: _Core) -> None:
        core.become(_OPEN, lets_through=False)
        back_off = min(LONGEST_BACK_OFF, FIRST_BACK_OFF * 2.0 ** min(core.openings, 32))
        back_off *= (1 + core.random()) / 2
        core.openings += 1
        core.until = core.clock.seconds() + back_off
        _log.warn("backend {backend}: circuit open for {seconds:.1f} s", backend=core.name, seconds=back_off)

    @trying.upon(_Events.succeeded).to(closed)
    def close(machine: _Events, core: _Core) -> None:
        core.become(_CLOSED, lets_through=True)
        core.openings = 0
        _log.info("backend {backend}: circuit closed", backend=core.name)

    @open_.upon(_Events.cool).to(half_open)
    @trying.upon(_Events.abandoned).to(half_open)
    def await_trial(machine: _Events, core: _Core) -> None:
        core.become(_HALF_OPEN, lets_through=True)

    @half_open.upon(_Events.enter).to(trying)
    def begin_trial(machine: _Events, core: _Core) -> None:
        core.become(_HALF_OPEN, lets_through=False)

    for state in (closed, half_open, trying):
        state.upon(_Events.cool).loop().returns(None)
    for state in (open_, half_open, trying):
        state.upon(_Events.trip).loop().returns(None)
    return builder.build()


_make_machine = _build()
