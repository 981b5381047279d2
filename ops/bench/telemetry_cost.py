"""What telemetry costs an event: CPU, aim at most 1.25 of what it is without; and what a bad collector does to the p99.

`python ops/bench/telemetry_cost.py` on Linux, with the daemon installed, or importable by PYTHONPATH.

The daemon answers `POST /event` over plain HTTP (TLS would only make telemetry's share smaller), before a model server
in a process of its own that answers at once. With telemetry on, one trace in ten is recorded and posted to a collector,
and each request leaves an access line; with it off there are neither. Metrics can't be switched off: they are counted
in both, and what they take is measured by themselves.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from prometheus_client import CollectorRegistry

from ai_ticket.event import Usage
from ai_ticket.interfaces import AttemptOutcome
from ai_ticket.telemetry.backend_metrics import BackendMetrics
from ai_ticket.telemetry.metrics import Metrics
from ai_ticket.telemetry.pipeline_metrics import PipelineMetrics

ROUNDS = 7
EVENTS = 2000
CALLERS = 8
PACE_SECONDS = 10.0
EVENTS_A_SECOND = 40
TICKS = os.sysconf("SC_CLK_TCK")

OFF = {"OTEL_TRACES_EXPORTER": "none", "LOG_LEVEL": "ERROR"}
SAMPLED = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.1"}

BODY = b'{"content":"What is the capital of France?","parameters":{"max_tokens":20}}'
REQUEST = (
    b"POST /event HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer bench\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
)

WORDS = ("The", " capital", " of", " France", " is", " Paris", ".")
STREAM = "".join(
    f"data: {chunk}\n\n"
    for chunk in (
        *(f'{{"choices":[{{"delta":{{"content":"{word}"}},"finish_reason":null}}],"model":"m"}}' for word in WORDS),
        '{"choices":[{"delta":{},"finish_reason":"stop"}]}',
        '{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":7,"total_tokens":14}}',
        "[DONE]",
    )
).encode()
ABOUT = {
    "koboldcpp": {
        b"/api/extra/version": b'{"result":"KoboldCpp","version":"1.115.1","llm":true}',
        b"/v1/models": b'{"data":[{"id":"koboldcpp/m"}]}',
        b"/api/extra/true_max_context_length": b'{"value":4096}',
    },
    "llama.cpp": {b"/props": b'{"total_slots":8,"model_alias":"m"}'},
}


# What the daemon talks to: each in a process of its own.


class Server(asyncio.Protocol):
    """Answers each request at once: a model server, or a collector that takes all."""

    def __init__(self, answers: dict[bytes, bytes], keep: bool) -> None:
        self._answers = answers
        self._keep = keep
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A connection has come."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Some of a request has come."""
        self._data += data
        while b"\r\n\r\n" in self._data:
            head, _, rest = self._data.partition(b"\r\n\r\n")
            lines = head.lower().split(b"\r\n")
            size = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
            if len(rest) < size:
                return
            self._data = rest[size:]
            method, path, _ = head.split(b" ", 2)
            self._answer(method, path)

    def _answer(self, method: bytes, path: bytes) -> None:
        status, kind, body = b"200 OK", b"application/json", self._answers.get(path, b"")
        if path == b"/v1/chat/completions":
            kind, body = b"text/event-stream", STREAM
        elif method == b"GET" and not body:
            status = b"404 Not Found"
        end = b"" if self._keep else b"connection: close\r\n"
        head = b"HTTP/1.1 %s\r\ncontent-type: %s\r\n%scontent-length: %d\r\n\r\n" % (status, kind, end, len(body))
        self._transport.write(head + body)  # type: ignore[attr-defined]
        if not self._keep:
            self._transport.close()


def serve(kind: str) -> None:
    """Be a model server of this kind, or a `collector`."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Server(ABOUT.get(kind, {}), kind != "koboldcpp"), "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    asyncio.run(run())


@contextmanager
def serving(kind: str) -> Iterator[str]:
    """The URL of such a server."""
    with subprocess.Popen([sys.executable, __file__, kind], stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            assert process.stdout is not None  # noqa: S101
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


@contextmanager
def silent() -> Iterator[str]:
    """The URL of a collector that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


# The daemon, and what is asked of it.


class Daemon:
    """A running daemon, and its CPU."""

    def __init__(self, folder: str, backend: str, settings: dict[str, str]) -> None:
        self.port = free_port()
        certificate = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-batch"]
        files = ["-keyout", "server.key", "-out", "server.crt"]
        subprocess.run(["openssl", "req", *certificate, *files], cwd=folder, check=True, capture_output=True)  # noqa: S603, S607
        environ = {
            "KOBOLDCPP_API_URL": backend,
            "KOBOLDCPP_SLOTS": str(CALLERS),
            "AI_TICKET_AUTH_TOKEN": "bench",
            "TLS_CERT_FILE": "server.crt",
            "TLS_KEY_FILE": "server.key",
            "TLS_PORT": "0",
            "HTTP_PORT": str(self.port),
            "OTEL_PROMETHEUS_PORT": "0",
            "BIND_HOST": "127.0.0.1",
            "OTEL_PROMETHEUS_HOST": "127.0.0.1",
            "RATE_LIMIT_REQUESTS": "1000000",
            **{name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ},
            **settings,
        }
        command = [str(Path(sys.executable).parent / "twistd"), "--nodaemon", "--pidfile=", "ai-ticket"]
        with open(Path(folder, "log"), "w") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log)  # noqa: S603
        end = time.monotonic() + 30
        while not self._answers():
            if time.monotonic() > end or self.process.poll() is not None:
                raise SystemExit(f"the daemon does not start: {Path(folder, 'log').read_text()}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port)) as connection:
                connection.sendall(b"GET /health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
                return b" 200 " in connection.recv(65_536)
        except ConnectionError:
            return False

    @property
    def cpu(self) -> float:
        """Seconds that all its threads have taken so far, the kernel's on their behalf included."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def stop(self) -> float:
        """Stop it; how many seconds that took."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
        return time.monotonic() - began


async def event(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One event, answered well."""
    writer.write(REQUEST)
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        raise SystemExit(head.decode())
    size = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    await reader.readexactly(size)


async def events(daemon: Daemon, count: int) -> None:
    """So many events, each caller sending one after the other."""

    async def caller() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        for _ in range(count // CALLERS):
            await event(reader, writer)
        writer.close()

    await asyncio.gather(*(caller() for _ in range(CALLERS)))


async def paced(daemons: dict[str, Daemon]) -> dict[str, list[float]]:
    """Events at a steady pace, one for each daemon in turn, so that whatever else the machine does is the same for all.

    None waits for those before it. How many seconds each took.
    """
    idle: dict[str, list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]] = {name: [] for name in daemons}
    seconds: dict[str, list[float]] = {name: [] for name in daemons}
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def one(name: str, due: float) -> None:
        kept = idle[name]
        connection = kept.pop() if kept else await asyncio.open_connection("127.0.0.1", daemons[name].port)
        await event(*connection)
        seconds[name].append(loop.time() - due)
        kept.append(connection)

    asked = []
    step = 1 / EVENTS_A_SECOND / len(daemons)
    for number in range(int(PACE_SECONDS * EVENTS_A_SECOND)):
        for place, name in enumerate(daemons):
            due = began + (number * len(daemons) + place) * step
            await asyncio.sleep(max(0.0, due - loop.time()))
            asked.append(asyncio.ensure_future(one(name, due)))
    await asyncio.gather(*asked)
    for kept in idle.values():
        for _, writer in kept:
            writer.close()
    return seconds


# The measurements.


def metrics_alone(count: int = 20_000) -> float:
    """Seconds of CPU that the metrics of an event take."""
    registry = CollectorRegistry()
    metrics, pipeline = Metrics("bench", registry), PipelineMetrics("bench", registry)
    backend = BackendMetrics("bench", registry, ["localhost:1"], ["/v1/chat/completions"])
    attempt = AttemptOutcome("localhost:1", "/v1/chat/completions", "ok", 0.01, 0.005, Usage(7, 7, 14))
    began = time.process_time()
    for _ in range(count):
        metrics.request_started()
        pipeline.event_began(0.001)
        backend.attempt_ended(attempt)
        pipeline.event_ended("ok", 0.01)
        pipeline.batch_ended(1, 0.01)
        metrics.request_finished("/event", "POST", 200, 0.01)
        metrics.overhead("/event", 0.001)
    return (time.process_time() - began) / count


def measure_cpu(kind: str) -> None:
    """Print what an event takes, with and without telemetry, before this kind of model server."""
    with ExitStack() as stack:
        backend, collector = (stack.enter_context(serving(each)) for each in (kind, "collector"))
        to_collector = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector}
        daemons = {}
        for name, settings in (("on", to_collector | SAMPLED), ("off", OFF), ("on, every trace", to_collector)):
            daemons[name] = Daemon(stack.enter_context(tempfile.TemporaryDirectory()), backend, settings)
            stack.callback(daemons[name].stop)
            asyncio.run(events(daemons[name], EVENTS // 4))
        taken: dict[str, list[float]] = {name: [] for name in daemons}
        for _ in range(ROUNDS):
            for name, daemon in daemons.items():
                before = daemon.cpu
                asyncio.run(events(daemon, EVENTS))
                time.sleep(0.2)
                taken[name].append((daemon.cpu - before) / EVENTS)
    for name, found in taken.items():
        ratio = median(one / off for one, off in zip(found, taken["off"], strict=True))
        rounds = " ".join(f"{seconds * 1e6:.0f}" for seconds in found)
        each = f"{median(found) * 1e6:4.0f} us an event, {ratio:.3f} of `off`"
        print(f"{kind}, telemetry {name:15}: {each} (rounds: {rounds})", flush=True)


def measure_collectors() -> None:
    """Print how long events take with every trace recorded, by what the collector does."""
    with ExitStack() as stack:
        backend = stack.enter_context(serving("koboldcpp"))
        urls = {
            "takes all": stack.enter_context(serving("collector")),
            "is dead": f"http://127.0.0.1:{free_port()}",
            "hangs": stack.enter_context(silent()),
        }
        daemons = {}
        for name, url in [("is not there", None), *urls.items()]:
            settings = OFF if url is None else {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "LOG_LEVEL": "ERROR"}
            daemons[name] = Daemon(stack.enter_context(tempfile.TemporaryDirectory()), backend, settings)
            asyncio.run(events(daemons[name], EVENTS // 4))
        taken: dict[str, list[float]] = {name: [] for name in daemons}
        p99s: dict[str, list[float]] = {name: [] for name in daemons}
        for _ in range(ROUNDS):
            for name, found in asyncio.run(paced(daemons)).items():
                taken[name] += found
                p99s[name].append(sorted(found)[int(0.99 * len(found))] * 1e3)
        for name, daemon in daemons.items():
            p50, p99, worst = median(taken[name]) * 1e3, median(p99s[name]), max(taken[name]) * 1e3
            rounds = " ".join(f"{value:.0f}" for value in p99s[name])
            times = f"median {p50:.1f} ms, p99 {p99:.0f} ms (rounds: {rounds}), worst {worst:.0f} ms"
            print(f"the collector {name:12}: {times}; stopped in {daemon.stop():.1f} s")


def main() -> None:
    """Measure."""
    if len(sys.argv) > 1:
        serve(sys.argv[1])
        return
    print(f"metrics alone: {metrics_alone() * 1e6:.0f} us an event", flush=True)
    for kind in ABOUT:
        measure_cpu(kind)
    measure_collectors()


if __name__ == "__main__":
    main()
