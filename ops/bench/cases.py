"""The cases, and how a row of one is measured."""

import math
import threading
from collections import Counter
from dataclasses import dataclass, replace

import wire
from figures import Round, percentile
from job import Call, Job, Outcome, finish, one_of_several, start
from peers import AI_TICKET, ANSWER_ROWS, BASE, DIRECT, NOT_READ, QUIET, STREAM_ROWS, TWO_WORKERS, Row
from processes import Target, cpu_seconds, resident_bytes


@dataclass(frozen=True)
class Case:
    """What callers do. `streams`: so many at a time, of so many tokens, at so many a second; 0: one-answer events.

    `about`: the row without which there is nothing to compare.

    `fresh`: in processes that have done nothing else, so that their memory tells what streams take.
    """

    name: str
    title: str
    rows: tuple[Row, ...] = ANSWER_ROWS
    callers: int = 32
    prompt: int = 1024
    tls: bool = False
    keep: bool = True
    backend: str = "llama.cpp"
    streams: int = 0
    tokens: int = 200
    pace: int = 50
    passes: int = 1
    fresh: bool = False
    about: Row = AI_TICKET

    @property
    def order(self) -> wire.Order:
        """What the prompts ask for."""
        return wire.Order(self.tokens, self.pace, self.prompt) if self.streams else wire.Order(size=self.prompt)

    @property
    def settings(self) -> tuple[tuple[str, str], ...]:
        """For AI Ticket, where the model server does not say them: KoboldCPP does not tell its slots."""
        return (("KOBOLDCPP_SLOTS", str(self.callers)),) if self.backend == "koboldcpp" else ()


CASES = (
    Case("answers", "One answer, prompts of 1 KiB"),
    Case("answers-64k", "One answer, prompts of 64 KiB", prompt=65536),
    Case("answers-tls", "One answer, over TLS", tls=True),
    Case("churn", "One answer, a connection for each", keep=False),
    Case("churn-tls", "One answer, a TLS connection for each", tls=True, keep=False),
    Case("koboldcpp", "One answer, a model server that closes its connections", backend="koboldcpp"),
    Case("telemetry", "One answer, telemetry on and off", rows=(DIRECT, AI_TICKET, QUIET, BASE)),
    Case("workers", "One answer, worker processes", rows=(DIRECT, AI_TICKET, TWO_WORKERS, BASE), about=TWO_WORKERS),
    Case("streams-1", "1 stream of 200 tokens at 50 a second", rows=STREAM_ROWS, streams=1, passes=2),
    Case("streams-64", "64 streams of 200 tokens at 50 a second", rows=STREAM_ROWS, streams=64),
    Case("streams-64-tls", "64 streams, over TLS", rows=STREAM_ROWS, streams=64, tls=True),
    Case("streams-1000", "1,000 streams of 200 tokens at 50 a second", rows=STREAM_ROWS, streams=1000, fresh=True),
    Case(
        "streams-1000-slow",
        "1,000 streams of 40 tokens at 5 a second",
        rows=STREAM_ROWS,
        streams=1000,
        tokens=40,
        pace=5,
        fresh=True,
    ),
)

QUICK = ("answers", "answers-tls", "churn", "telemetry", "workers", "streams-1", "streams-64", "streams-1000")


SLOW = ("fastapi", "litellm")


def quick(case: Case) -> Case:
    """The same in little time; the slow peers show only in the first case."""
    rows = tuple(row for row in case.rows if row.peer not in SLOW and not row.name.endswith(NOT_READ))
    return replace(
        case,
        rows=case.rows if case is CASES[0] else rows,
        tokens=min(case.tokens, 25),
        title=case.title.replace("200 tokens", "25 tokens"),
        passes=1,
    )


@dataclass(frozen=True)
class Effort:
    """Seconds for each measurement of answers, with all callers and with one; and processes that make load."""

    busy: float = 4.0
    alone: float = 1.5
    loaders: int = 1


def measure(case: Case, row: Row, target: Target, effort: Effort) -> Round:
    """One row, once."""
    return _streams(case, row, target, effort) if case.streams else _answers(case, row, target, effort)


def warm_up(case: Case, row: Row, target: Target) -> None:
    """Some calls, so that nothing is done for the first time when it counts; but for what is to be fresh."""
    if not case.fresh:
        finish(start(_job(case, row, target, callers=8, seconds=0.5)))


def _job(case: Case, row: Row, target: Target, callers: int, seconds: float) -> Job:
    order = case.order
    call = Call(row.request(order, bool(case.streams), case.keep).decode("latin-1"), tokens=order.tokens)
    certificate = None if target.certificate is None else str(target.certificate)
    return Job(target.port, [call], callers, seconds, keep=case.keep, certificate=certificate)


def _load(job: Job, effort: Effort) -> Outcome:
    loaders = min(effort.loaders, job.callers)
    processes = [start(one_of_several(job, loaders, number)) for number in range(loaders)]
    outcome = Outcome()
    for process in processes:
        outcome.add(finish(process))
    return outcome


def _answers(case: Case, row: Row, target: Target, effort: Effort) -> Round:
    before = cpu_seconds(target.pid)
    busy = _load(_job(case, row, target, case.callers, effort.busy), effort)
    spent = cpu_seconds(target.pid) - before
    alone = _load(_job(case, row, target, 1, effort.alone), effort)
    return Round(
        rate=busy.good / busy.seconds,
        cpu=spent / busy.good if busy.good else math.nan,
        p50=percentile(alone.taken, 0.5) / 1e6,
        p99=percentile(alone.taken, 0.99) / 1e6,
        busy_p99=percentile(busy.taken, 0.99) / 1e6,
        resident=resident_bytes(target.pid),
        count=busy.good,
        errors=dict(Counter(alone.errors) + Counter(busy.errors)),
    )


def _streams(case: Case, row: Row, target: Target, effort: Effort) -> Round:
    ramp = case.streams / 500
    job = replace(
        _job(case, row, target, case.streams, case.passes * (ramp + 1.5 * case.tokens / case.pace) + 4),
        passes=case.passes,
        patience=0.0,
        ramp=ramp,
    )
    before, cpu, peak = resident_bytes(target.pid), cpu_seconds(target.pid), 0
    over = threading.Event()

    def look() -> None:
        nonlocal peak
        while not over.wait(0.2):
            peak = max(peak, resident_bytes(target.pid))

    looking = threading.Thread(target=look)
    looking.start()
    outcome = _load(job, effort)
    spent = cpu_seconds(target.pid) - cpu
    over.set()
    looking.join()
    return Round(
        rate=outcome.tokens / outcome.seconds,
        cpu=spent / outcome.tokens if outcome.tokens else math.nan,
        p50=percentile(outcome.first, 0.5) / 1e6,
        p99=percentile(outcome.first, 0.99) / 1e6,
        jitter=percentile(outcome.jitter, 0.99) / 1e6,
        resident=max(peak, before),
        each=max(0, peak - before) / case.streams if case.fresh else math.nan,
        count=outcome.good,
        errors=outcome.errors,
    )
