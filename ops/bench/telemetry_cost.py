"""What telemetry costs an event: CPU, aim at most 1.25 of what it is without; and what a bad collector does to the p99.

`python ops/bench/telemetry_cost.py` on Linux, with the daemon installed, or importable by PYTHONPATH.

The daemon answers `POST /event` over plain HTTP (TLS would only make telemetry's share smaller), before a model server
in a process of its own that answers at once. With telemetry on, one trace in ten is recorded and posted to a collector,
and each request leaves an access line; with it off there are neither. Metrics can't be switched off: they are counted
in both, and what they take is measured by themselves.
"""

import asyncio
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import wire
from processes import SAMPLED, TELEMETRY_OFF, Target, canned, cpu_seconds, free_port, start_ai_ticket
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

BODY = wire.event_body(wire.Order(), stream=False)
REQUEST = wire.request("/event", BODY)


def url(target: Target) -> str:
    """Where it answers."""
    return f"http://127.0.0.1:{target.port}"


@contextmanager
def silent() -> Iterator[str]:
    """The URL of a collector that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


# The daemon, and what is asked of it.


class Daemon:
    """A running daemon, and its CPU."""

    def __init__(self, folder: str, backend: str, settings: dict[str, str]) -> None:
        slots = {"KOBOLDCPP_SLOTS": str(CALLERS)}
        self._running = start_ai_ticket(Path(folder), backend, slots | settings)
        self.port = self._running.target.port
        self.stop = self._running.stop

    @property
    def cpu(self) -> float:
        """Seconds that all its threads have taken so far, the kernel's on their behalf included."""
        return cpu_seconds(self._running.target.pid)


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
        backend, collector = (url(stack.enter_context(canned(each))) for each in (kind, "collector"))
        to_collector = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector}
        daemons = {}
        for name, settings in (
            ("on", to_collector | SAMPLED),
            ("off", TELEMETRY_OFF),
            ("on, every trace", to_collector),
        ):
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
        backend = url(stack.enter_context(canned("koboldcpp")))
        urls = {
            "takes all": url(stack.enter_context(canned("collector"))),
            "is dead": f"http://127.0.0.1:{free_port()}",
            "hangs": stack.enter_context(silent()),
        }
        daemons = {}
        for name, at in [("is not there", None), *urls.items()]:
            settings = TELEMETRY_OFF if at is None else {"OTEL_EXPORTER_OTLP_ENDPOINT": at, "LOG_LEVEL": "ERROR"}
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
    print(f"metrics alone: {metrics_alone() * 1e6:.0f} us an event", flush=True)
    for kind in ("koboldcpp", "llama.cpp"):
        measure_cpu(kind)
    measure_collectors()


if __name__ == "__main__":
    main()
