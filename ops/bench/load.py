"""The load generator: callers over raw asyncio protocols, in a process of its own. `python ops/bench/load.py < JOB`.

A job is a JSON object (`Job`), what comes of it another (`Outcome`). Every answer is checked: its status, that it came
whole, its text. A wrong one is an error, and counts for nothing else.
"""

import asyncio
import json
import random
import ssl
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import wire
from backend import run

WATCHED = 100
"""Callers at most whose tokens are timed: looking at each piece of all would hold up those that are looked at."""


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


class Answer:
    """The parser of an answer: the head, then a body of known length, in chunks, or up to the end."""

    def __init__(self) -> None:
        self._data = b""
        self._left: int | None = 0
        self.chunked = False
        self._in_body = False
        self.status = 0
        self.closes = False
        self.done = False

    def feed(self, data: bytes) -> bytes:
        """What of the body these bytes bring."""
        if not self._in_body:
            self._data += data
            end = self._data.find(b"\r\n\r\n")
            if end < 0:
                return b""
            head, data, self._data = self._data[:end].lower(), self._data[end + 4 :], b""
            self._in_body = True
            self.status = int(head[9:12])
            self.closes = b"\r\nconnection: close" in head or head.startswith(b"http/1.0")
            place = head.find(b"\r\ncontent-length:")
            self.chunked = b"\r\ntransfer-encoding: chunked" in head
            self._left = int(head[place + 17 :].split(b"\r\n", 1)[0]) if place >= 0 else None
        if self.chunked:
            return self._chunks(data)
        if self._left is not None:
            self._left -= len(data)
            self.done = self._left <= 0
        return data

    def _chunks(self, data: bytes) -> bytes:
        data = self._data + data if self._data else data
        found, place = [], 0
        while (end := data.find(b"\r\n", place)) >= 0:
            size = int(data[place:end].split(b";", 1)[0], 16)
            if len(data) < end + 4 + size:
                break
            found.append(data[end + 2 : end + 2 + size])
            place = end + 4 + size
            if not size:
                self.done = True
                break
        self._data = data[place:]
        return found[0] if len(found) == 1 else b"".join(found)

    def ended(self) -> None:
        """The connection has ended, and with it a body that has no other end."""
        self.done = self.done or (self._in_body and self._left is None and not self.chunked)


class Caller(asyncio.Protocol):
    """Sends a call, checks what comes, and sends the next."""

    def __init__(self, load: "Load", left: int | None) -> None:
        self._load = load
        self._left = left
        self._watched = load.watches()
        self._unread: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._leaving: asyncio.TimerHandle | None = None
        self._begin_call()

    def _begin_call(self) -> None:
        self.call, self._request = self._load.pick()
        self._answer = Answer()
        self._body: list[bytes] = []
        self._last: tuple[int, int] | None = None
        self._tail = b""
        self._seen = 0
        self._sent_at = wire.stamp()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected: the first call goes out. In churn, connecting is part of what it takes."""
        self._transport = cast(asyncio.Transport, transport)
        self._load.open.add(self)
        if self._load.job.keep:
            self._sent_at = wire.stamp()
        self._send()

    def _send(self) -> None:
        assert self._transport is not None  # noqa: S101
        self._transport.write(self._request)
        if self.call.hang_up is not None:
            self._leaving = asyncio.get_running_loop().call_later(self.call.hang_up, self._hang_up)

    def _hang_up(self) -> None:
        assert self._transport is not None  # noqa: S101
        self._load.outcome.hung_up += 1
        self._leaving = None
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended: whether that is an error depends on what it ended."""
        self._load.open.discard(self)
        if self._transport is None or (self.call.hang_up is not None and self._leaving is None):
            self._again()
            return
        if self._left is not None:
            self._left -= 1
        self.read_unread()
        self._answer.ended()
        if self._answer.done:
            self._check()
        else:
            self._load.error("cut off" if self._answer.status else "no answer")
        self._again()

    def _again(self) -> None:
        """Call on another connection, if there is more to call."""
        self._stop_leaving()
        self._transport = None
        self._load.next_caller(self._left)

    def _stop_leaving(self) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None

    def data_received(self, data: bytes) -> None:
        """Some of the answer has come. Of a stream that is not watched, only the head is read before its end came."""
        if self.call.tokens and not self._watched and self._answer.chunked:
            self._unread.append(data)
            if data.endswith(b"0\r\n\r\n") or len(data) < 5:
                self.read_unread()
        else:
            self._read(data)

    def read_unread(self) -> None:
        """Take in what has come and was put aside."""
        if self._unread:
            data = b"".join(self._unread)
            self._unread.clear()
            self._read(data)

    def _read(self, data: bytes) -> None:
        body = self._answer.feed(data)
        if self.call.tokens and body:
            self._take_tokens(body)
        self._body.append(body)
        if self._answer.done and self._transport is not None:
            self._check()
            self._stop_leaving()
            transport, self._transport = self._transport, None
            if self._left is not None:
                self._left -= 1
            if self._load.job.keep and not self._answer.closes and self._load.goes_on(self._left):
                self._transport = transport
                self._begin_call()
                self._send()
            else:
                transport.close()

    def _take_tokens(self, body: bytes) -> None:
        now = wire.stamp()
        data = self._tail + body
        outcome = self._load.outcome
        place = data.rfind(b"~")
        self._tail = data[place:] if place >= 0 and len(data) - place < wire.TOKEN_BYTES else b""
        found = wire.tokens(data)
        self._seen += len(found)
        outcome.tokens += len(found)
        if not self._watched:
            return
        for sent in found:
            if self._last is None:
                outcome.first.append(wire.since(now, self._sent_at))
            else:
                came_before, sent_before = self._last
                outcome.jitter.append(abs(wire.since(now, came_before) - wire.since(sent, sent_before)))
            self._last = now, sent

    def _check(self) -> None:
        call, answer, body = self.call, self._answer, b"".join(self._body)
        if answer.status not in call.status:
            self._load.error(f"status {answer.status}")
        elif answer.status != 200 or (call.text is None and not call.tokens):
            self._good()
        elif code := wire.error_within(body):
            self._load.error(f"{code} within a stream")
        elif call.tokens and not (self._seen == call.tokens and wire.has_ended(body)):
            self._load.error("wrong tokens")
        elif not call.tokens and wire.text_of(body) != call.text:
            self._load.error("wrong text")
        else:
            self._good()

    def _good(self) -> None:
        self._load.outcome.good += 1
        self._load.outcome.taken.append(wire.since(wire.stamp(), self._sent_at))


class Load:
    """All callers of a job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.outcome = Outcome()
        self._calls = [(call, call.request.encode("latin-1")) for call in job.calls]
        self._chances = [call.chance for call in job.calls]
        self._tls = ssl.create_default_context(cafile=job.certificate) if job.certificate else None
        self._loop = asyncio.get_running_loop()
        self._idle = 0
        self._count = 0
        self.open: set[Caller] = set()
        self._over = asyncio.Event()
        self._connecting: set[asyncio.Task[None]] = set()

    def pick(self) -> tuple[Call, bytes]:
        """The next call."""
        if len(self._calls) == 1:
            return self._calls[0]
        return random.choices(self._calls, self._chances)[0]  # noqa: S311

    def goes_on(self, left: int | None) -> bool:
        """Whether a caller with so many calls left is to make another."""
        return self._loop.time() < self._end and (left is None or left > 0)

    def error(self, what: str) -> None:
        """A call went wrong."""
        self.outcome.errors[what] = self.outcome.errors.get(what, 0) + 1

    def next_caller(self, left: int | None, after: float = 0.0) -> None:
        """Another caller, who connects; or none, and with the last the job is over."""
        if not self.goes_on(left):
            self._idle += 1
            if self._idle == self.job.callers:
                self._over.set()
            return
        connecting = self._loop.create_task(self._connect(left, after))
        self._connecting.add(connecting)
        connecting.add_done_callback(self._connecting.discard)

    def watches(self) -> bool:
        """Whether the next caller's tokens are to be timed: every so many-th one's."""
        self._count += 1
        return self._count % max(1, self.job.callers // WATCHED) == 0

    async def _connect(self, left: int | None, after: float) -> None:
        await asyncio.sleep(after)
        try:
            await self._loop.create_connection(
                lambda: Caller(self, left),
                "127.0.0.1",
                self.job.port,
                ssl=self._tls,
                server_hostname="localhost" if self._tls else None,
            )
        except OSError as error:
            self.error(f"not connected: {type(error).__name__}")
            self.next_caller(None if left is None else left - 1, 0.05)

    async def run(self) -> Outcome:
        """Until all callers have ended; those who have not some time later are errors."""
        began = self._loop.time()
        self._end = began + self.job.seconds
        for number in range(self.job.callers):
            self.next_caller(self.job.passes, self.job.ramp * number / self.job.callers)
        try:
            await asyncio.wait_for(self._over.wait(), self.job.seconds + self.job.patience)
        except TimeoutError:
            self.outcome.errors["not done in time"] = self.job.callers - self._idle
            for caller in self.open:
                caller.read_unread()
        self.outcome.seconds = self._loop.time() - began
        return self.outcome


def start(job: Job) -> "subprocess.Popen[str]":
    """The job, in a process of its own."""
    command = [sys.executable, str(Path(__file__))]
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


async def main() -> None:
    """Do the job that standard input describes."""
    given = json.load(sys.stdin)
    job = Job(**{**given, "calls": [Call(**call) for call in given["calls"]]})
    json.dump(asdict(await Load(job).run()), sys.stdout)


if __name__ == "__main__":
    run(main())
