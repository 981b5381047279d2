"""The load generator: callers over raw asyncio protocols, in a process of its own. `python ops/bench/load.py < JOB`.

A job is a JSON object (`Job`), what comes of it another (`Outcome`). Every answer is checked: its status, that it came
whole, its text. A wrong one is an error, and counts for nothing else.
"""

import asyncio
import json
import random
import ssl
import sys
from dataclasses import asdict
from typing import cast

import wire
from answer import Answer
from backend import run
from job import Call, Job, Outcome

WATCHED = 100
"""Callers at most whose tokens are timed: looking at each piece of all would hold up those that are looked at."""


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


async def main() -> None:
    """Do the job that standard input describes."""
    given = json.load(sys.stdin)
    job = Job(**{**given, "calls": [Call(**call) for call in given["calls"]]})
    json.dump(asdict(await Load(job).run()), sys.stdout)


if __name__ == "__main__":
    run(main())
