"""What the load generator is to do, what came of it, and the processes that do it."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field

import wire
from processes import HERE


@dataclass
class Call:
    """A request, and what is to come of it: a status, a text or so many stamped tokens.

    `chance`: how often it is picked, against the others. `hang_up`: seconds after which the caller leaves; what came
    until then is not checked. `status` may be several: any of them will do, and only a 200 has the text.
    """

    request: str
    status: list[int] = field(default_factory=lambda: [200])
    text: str | None = wire.TEXT
    tokens: int = 0
    chance: float = 1.0
    hang_up: float | None = None


@dataclass
class Job:
    """So many callers, each sending one call after the other until the time is over, or `passes` calls.

    `keep`: one connection for all calls of a caller. `ramp`: seconds over which the callers come. `patience`: seconds
    for what is under way when the time is over.
    """

    port: int
    calls: list[Call]
    callers: int
    seconds: float
    passes: int | None = None
    keep: bool = True
    ramp: float = 0.0
    patience: float = 30.0
    certificate: str | None = None


@dataclass
class Outcome:
    """What came of it. Times are in microseconds; `taken` from sending to the end of each good answer.

    `jitter`: of each token but the first of a stream, by how much more or less it came after the one before than it was
    sent after it.
    """

    good: int = 0
    hung_up: int = 0
    seconds: float = 0.0
    taken: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    jitter: list[int] = field(default_factory=list)
    tokens: int = 0
    errors: dict[str, int] = field(default_factory=dict)

    def add(self, other: "Outcome") -> None:
        """Of several processes that ran at a time."""
        self.good += other.good
        self.hung_up += other.hung_up
        self.seconds = max(self.seconds, other.seconds)
        self.taken += other.taken
        self.first += other.first
        self.jitter += other.jitter
        self.tokens += other.tokens
        for error, count in other.errors.items():
            self.errors[error] = self.errors.get(error, 0) + count


def start(job: Job) -> "subprocess.Popen[str]":
    """The job, in a process of its own."""
    command = [sys.executable, str(HERE / "load.py")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
    assert process.stdin is not None  # noqa: S101
    process.stdin.write(json.dumps(asdict(job)))
    process.stdin.close()
    return process


def finish(process: "subprocess.Popen[str]") -> Outcome:
    """What came of it."""
    assert process.stdout is not None  # noqa: S101
    outcome = Outcome(**json.loads(process.stdout.read()))
    process.wait()
    return outcome


def one_of_several(job: Job, processes: int, number: int) -> Job:
    """A process's share of the callers."""
    callers = job.callers // processes + (number < job.callers % processes)
    return Job(**{**vars(job), "callers": callers})
