"""How far a batch is: on a terminal a bar, elsewhere a line now and then, and at the end a summary."""

import math
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall

from ai_ticket.cli import console
from ai_ticket.cli.batch_delivery import Gate
from ai_ticket.cli.body import Fields

_BAR_INTERVAL = 0.25
_LINE_INTERVAL = 10.0
_PACE_OVER = 60.0
"""The rate is that of so many seconds past, so that it soon follows a service that gets slower or faster."""


class Tally:
    """Counts answers.

    @param total: how many events there are, if that is known.
    @param earlier: how many were answered in an earlier run, and `earlier_failed` how many of these are errors.
    """

    def __init__(self, clock: IReactorTime, total: int | None, earlier: int, earlier_failed: int):
        self._clock = clock
        self._began_at = clock.seconds()
        self.total = total
        self.earlier = earlier
        self.earlier_failed = earlier_failed
        self.succeeded = 0
        self.failures: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

    @property
    def failed(self) -> int:
        """How many got an error in this run."""
        return self.failures.total()

    @property
    def finished(self) -> int:
        """How many got an answer in this run, errors included."""
        return self.succeeded + self.failed

    def add(self, result: Fields) -> None:
        """An event has its answer."""
        if result["status"] != 200:
            self.failures[str(result.get("error"))] += 1
            return
        self.succeeded += 1
        usage = result.get("usage")
        for kind in ("prompt_tokens", "completion_tokens"):
            count = usage.get(kind) if isinstance(usage, dict) else None
            self._tokens[kind] += count if isinstance(count, int) else 0

    def summary(self) -> list[str]:
        """What this run did, in a few lines."""
        parts = [f"{self.succeeded:,} answered", f"{self.failed:,} failed"]
        if self.failures:
            parts[1] += f" ({', '.join(f'{code} {count:,}' for code, count in self.failures.most_common())})"
        if self.earlier:
            parts.append(f"{self.earlier:,} skipped as already done")
            if self.earlier_failed:
                parts[-1] += f" ({self.earlier_failed:,} of them failed)"
        seconds = self._clock.seconds() - self._began_at
        prompt, completion = self._tokens["prompt_tokens"], self._tokens["completion_tokens"]
        rate = self.finished / seconds if seconds else 0.0
        return [
            ", ".join(parts),
            f"{seconds:.1f} s, {rate:.1f} events/s, {prompt + completion:,} tokens"
            f" ({prompt:,} of prompts, {completion:,} of completions)",
        ]


@contextmanager
def shown(clock: IReactorTime, tally: Tally, gate: Gate, *, bar: bool = True) -> Iterator[None]:
    """Show how far it is on stderr while the body runs; without `bar` in lines also where that is a terminal."""
    pace = _Pace(clock, tally)
    if not (bar and sys.stderr.isatty()):
        with _every(_LINE_INTERVAL, clock, lambda: console.say(_describe(tally, gate, pace.rate()))):
            yield
        return
    progress = Progress(
        BarColumn(bar_width=20, table_column=Column(width=20)),
        TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        console=Console(stderr=True),
        expand=True,  # so that a long text is cut, not the bar
        auto_refresh=False,  # its own way is a thread
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    task = progress.add_task("", total=tally.total)

    def update() -> None:
        text = console.printable(_describe(tally, gate, pace.rate()))
        progress.update(task, completed=tally.earlier + tally.finished, description=text, refresh=True)

    with progress, _every(_BAR_INTERVAL, clock, update):
        yield


@contextmanager
def _every(seconds: float, clock: IReactorTime, call: Callable[[], None]) -> Iterator[None]:
    loop = LoopingCall(call)
    loop.clock = clock
    loop.start(seconds, now=False).addErrback(lambda _: None)  # stderr was closed: nobody wants to see it
    try:
        yield
    finally:
        if loop.running:
            loop.stop()


class _Pace:
    """Events a second, lately."""

    def __init__(self, clock: IReactorTime, tally: Tally):
        self._clock = clock
        self._tally = tally
        self._samples = deque([(clock.seconds(), 0)])

    def rate(self) -> float:
        """To be asked for regularly."""
        now, finished = self._clock.seconds(), self._tally.finished
        self._samples.append((now, finished))
        while len(self._samples) > 2 and self._samples[1][0] <= now - _PACE_OVER:
            self._samples.popleft()
        since, before = self._samples[0]
        return (finished - before) / (now - since) if now > since else 0.0


def _describe(tally: Tally, gate: Gate, rate: float) -> str:
    done = tally.earlier + tally.finished
    parts = [f"{done:,}" if tally.total is None else f"{done:,}/{tally.total:,}", f"{rate:.1f}/s"]
    if tally.total is not None and rate > 0:
        parts.append(f"{_duration((tally.total - done) / rate)} left")
    if tally.failed:
        parts.append(f"{tally.failed:,} failed")
    if gate.closed_for:
        parts.append(f"waiting {_duration(gate.closed_for)}: {gate.reason}")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
