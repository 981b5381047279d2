"""The running service, over sockets of the loopback, under the same cases that the targets in memory get."""

import asyncio
import json
import os
import re
import ssl
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from daemon import TOKEN, Daemon, running

from fuzz import documents, http1, http2
from fuzz.mutation import split
from fuzz.targets import Wrong, check_statuses, random_of, statuses

CALLERS = 80
WARM_UP = 0.1
"""The share of the requests after which memory is looked at for the first time."""

PATIENCE = 60.0
SILENCE = 0.1
"""Seconds: for an answer that must come, and for what may follow one, or never come."""

_LENGTH = re.compile(rb"content-length: (\d+)\r\n", re.IGNORECASE)
_STREAM = b"".join(
    b"data: %s\n\n" % data
    for data in (
        b'{"choices":[{"delta":{"content":"Fine."},"finish_reason":null}],"model":"m"}',
        b'{"choices":[{"delta":{},"finish_reason":"stop"}]}',
        b'{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}',
        b"[DONE]",
    )
)
_ABOUT = {
    b"/api/extra/version": {"result": "KoboldCpp", "version": "1.115.1", "llm": True},
    b"/v1/models": {"data": [{"id": "koboldcpp/m"}]},
    b"/api/extra/true_max_context_length": {"value": 4096},
}


async def model_server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers one request at once."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        size = _LENGTH.search(head)
        if size is not None:
            await reader.readexactly(int(size[1]))
        method, path, _ = head.split(b" ", 2)
        if method == b"POST":
            writer.write(b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + _STREAM)
        elif path in _ABOUT:
            writer.write(
                b"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n" + json.dumps(_ABOUT[path]).encode()
            )
        else:
            writer.write(b"HTTP/1.0 404 Not Found\r\n\r\n")
        await writer.drain()
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


@dataclass
class Report:
    """What came of it. Memory in KiB, at the start, after the warm-up, and at the end; descriptors likewise."""

    requests: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    unanswered: int = 0
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """By which factor the memory has grown since the warm-up."""
        return self.memory[-1] / self.memory[1]


def memory_of(pid: int) -> int:
    """A process's resident memory, in KiB."""
    return int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0])


def descriptors_of(pid: int) -> int:
    """How many files a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


class Fuzzer:
    """Sends so many cases to the daemon."""

    def __init__(self, daemon: Daemon, seed: int, requests: int, say: Callable[[str], None]) -> None:
        self.report = Report()
        self._daemon = daemon
        self._pid = daemon.process.pid
        self._plain, self._secure = daemon.port("http"), daemon.port("https")
        self._seed = seed
        self._requests = requests
        self._say = say
        self._contexts = {}
        for protocol in ("http/1.1", "h2"):
            context = ssl.create_default_context(cafile=str(daemon.certificates.ca))
            context.set_alpn_protocols([protocol])
            self._contexts[protocol] = context

    async def run(self) -> Report:
        """All of them, and then what is left in the daemon."""
        self._look()
        warm_up = int(self._requests * WARM_UP)
        await self._send(range(warm_up))
        self._look()
        await self._send(range(warm_up, self._requests))
        await asyncio.sleep(2.5)  # until the daemon has looked through its connections
        self._look()
        return self.report

    def _look(self) -> None:
        self.report.memory.append(memory_of(self._pid))
        self.report.descriptors.append(descriptors_of(self._pid))
        self._say(
            f"{self.report.requests} requests: {self.report.memory[-1]} KiB, {self.report.descriptors[-1]} descriptors"
        )

    async def _send(self, numbers: range) -> None:
        left = iter(numbers)

        async def caller() -> None:
            for number in left:
                if self.report.wrong or self._daemon.process.poll() is not None:
                    return
                try:
                    await self._case(number)
                except (AssertionError, TimeoutError) as error:
                    again = f"again: python -m tests.fuzz --seed {self._seed} --target daemon --case {number}"
                    self.report.wrong.append(f"{type(error).__name__}: {error}\n{again}")
                self.report.requests += 1

        await asyncio.gather(*(caller() for _ in range(CALLERS)))

    async def one(self, number: int) -> None:
        """A single case.

        @raise AssertionError: it went wrong. @raise TimeoutError: it got no answer.
        """
        await self._case(number)

    async def _case(self, number: int) -> None:
        random = random_of(self._seed, "daemon", number)
        kind = random.random()
        if kind < 0.06:
            await self._http2(random)
        elif kind < 0.25:
            await self._body(random)
        else:
            await self._http1(random, secure=random.random() < 0.05)

    async def _http1(self, random: Random, *, secure: bool) -> None:
        case = http1.noise(random) if random.random() < 0.02 else http1.make(random, TOKEN.encode())
        self.report.kinds[case.verdict] += 1
        found = await self._exchange(split(random, case.data), "http/1.1" if secure else None, case.verdict != "any")
        self._count(statuses(found))
        check_statuses(case, statuses(found))

    async def _body(self, random: Random) -> None:
        path, media_type = random.choice([(b"/event", b"application/json"), (b"/events", b"application/x-ndjson")])
        body = documents.document(random) if path == b"/event" else documents.batch(random)
        head = b"POST %s HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n"
        data = head % (path, TOKEN.encode(), media_type, len(body)) + body
        self.report.kinds["body"] += 1
        answer = await self._exchange(split(random, data), None, True)
        found = statuses(answer)
        self._count(found)
        if len(found) != 1 or found[0] >= 500 or b"internal_error" in answer:
            raise Wrong(f"{path.decode()}: {found}", body)

    async def _http2(self, random: Random) -> None:
        case = http2.make(random, TOKEN.encode())
        self.report.kinds["HTTP/2"] += 1
        data = await self._exchange([case.data], "h2", False)
        try:
            found, _ = http2.statuses(data)
        except AssertionError as error:
            if str(error) in ("half a frame", "a frame that is not whole"):  # read up to here, no further
                return
            raise
        self._count(list(found.values()))
        if any(status >= 500 for status in found.values()):
            raise Wrong(f"{case.about}: {found}", case.data)
        if any(found.get(stream, 400) < 400 for stream in case.refused):
            raise Wrong(f"{case.about}: {found}, and none of {set(case.refused)} may succeed", case.data)

    def _count(self, found: list[int]) -> None:
        self.report.statuses.update(found)
        self.report.unanswered += not found

    async def _exchange(self, pieces: list[bytes], protocol: str | None, answered: bool) -> bytes:
        """What comes back until nothing more does. Where it must be answered, there is more patience."""
        port, context = (self._plain, None) if protocol is None else (self._secure, self._contexts[protocol])
        name = None if context is None else "localhost"
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)
        found = b""
        try:
            for piece in pieces:
                if writer.transport.is_closing():
                    break
                writer.write(piece)
                if len(pieces) < 10:
                    await asyncio.sleep(0)
            while True:
                patience = PATIENCE if answered and not statuses(found) else SILENCE
                data = await asyncio.wait_for(reader.read(65_536), patience)
                if not data:
                    return found
                found += data
        except TimeoutError:
            if answered and not statuses(found):
                raise
            return found
        except OSError:  # it has closed while something was on its way there
            return found
        finally:
            writer.transport.abort()


def fuzz_daemon(
    folder: Path, *, seed: int, requests: int, say: Callable[[str], None], case: int | None = None
) -> Report:
    """Start a daemon, send it so many cases (or that one), stop it.

    @raise AssertionError: something went wrong.
    """

    async def go() -> Report:
        server = await asyncio.start_server(model_server, "127.0.0.1", 0, backlog=1024)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/api"
        loop = asyncio.get_running_loop()
        settings = {"KOBOLDCPP_SLOTS": "256", "QUEUE_LIMIT": "10000", "OTEL_TRACES_EXPORTER": "none"}
        with running(folder, KOBOLDCPP_API_URL=url, **settings) as daemon:
            await loop.run_in_executor(None, daemon.ready)
            fuzzer = Fuzzer(daemon, seed, requests, say)
            if case is None:
                report = await fuzzer.run()
            else:
                await fuzzer.one(case)
                report = fuzzer.report
            assert daemon.process.poll() is None, f"the daemon has ended: {daemon.err[-3000:]}"
            daemon.process.terminate()
            await loop.run_in_executor(None, daemon.wait)
            assert not report.wrong, "\n".join(report.wrong)
            bad = [line for line in daemon.lines if line["level"] in ("ERROR", "CRITICAL") or "Traceback" in str(line)]
            assert not bad, json.dumps(bad[:3], indent=1)
            assert not daemon.err, daemon.err[-3000:]
        server.close()
        return report

    return asyncio.run(go())
