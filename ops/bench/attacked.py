"""A daemon to attack, for the scripts beside this: it ticks, and writes down whenever a tick came late."""

import resource
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from processes import (
    CERTIFICATE,
    KEY,
    Running,
    canned,
    environment,
    free_port,
    make_certificate,
    open_files,
    resident_bytes,
)

TOKEN = "bench"  # noqa: S105
TICK_SECONDS = 0.002
NOTED_SECONDS = 0.005

TAC = f"""
import time
from twisted.application.service import Application
from twisted.internet import reactor
from ai_ticket.tap import Options, makeService

application = Application("ai-ticket")
makeService(Options()).setServiceParent(application)
late_ticks = open("ticks", "w", buffering=1)


def tick(due, cpu_before):
    now, cpu = time.monotonic(), time.thread_time()
    if now - due > {NOTED_SECONDS}:
        print(now, now - due, cpu - cpu_before, file=late_ticks)
    reactor.callLater({TICK_SECONDS}, tick, time.monotonic() + {TICK_SECONDS}, time.thread_time())


reactor.callWhenRunning(tick, time.monotonic() + 60, 0.0)
"""


class LateTick(NamedTuple):
    """A tick at this time of the monotonic clock, so late; `cpu`: seconds of it that the reactor's thread took.

    The rest of it other processes had, or the reactor was asleep.
    """

    at: float
    late: float
    cpu: float


class Daemon:
    """A running daemon."""

    def __init__(self, folder: Path, backend: int, settings: dict[str, str]) -> None:
        self._folder = folder
        self.plain, self.secure = free_port(), free_port()
        make_certificate(folder)
        (folder / "attacked.tac").write_text(TAC)
        environ = {
            "KOBOLDCPP_API_URL": f"http://127.0.0.1:{backend}",
            "KOBOLDCPP_SLOTS": "16",
            "AI_TICKET_AUTH_TOKEN": TOKEN,
            "TLS_CERT_FILE": CERTIFICATE,
            "TLS_KEY_FILE": KEY,
            "TLS_PORT": str(self.secure),
            "HTTP_PORT": str(self.plain),
            "OTEL_PROMETHEUS_PORT": "0",
            "BIND_HOST": "127.0.0.1",
            "OTEL_PROMETHEUS_HOST": "127.0.0.1",
            "OTEL_TRACES_EXPORTER": "none",
            "RATE_LIMIT_REQUESTS": "0",
            **settings,
        }
        twistd = Path(sys.executable).parent / "twistd"
        command = [twistd, "--nodaemon", "--pidfile=", "-y", "attacked.tac"]
        self._running = Running(
            command, folder=folder, environ=environment(environ), port=self.plain, ready="/health/ready"
        )
        self.process = self._running.process

    def stop(self) -> None:
        """Stop it."""
        self._running.stop()

    @property
    def log(self) -> str:
        """All that it has said."""
        return (self._folder / "log").read_text()

    @property
    def ticks(self) -> list[LateTick]:
        """Those that came late so far."""
        lines = (self._folder / "ticks").read_text().rpartition("\n")[0].splitlines()
        return [LateTick(*map(float, line.split())) for line in lines]

    @property
    def memory(self) -> int:
        """Resident, in KiB."""
        return resident_bytes(self.process.pid) // 1024

    @property
    def descriptors(self) -> int:
        """How many files it has open."""
        return open_files(self.process.pid)


@contextmanager
def attacked(settings: dict[str, str]) -> Iterator[Daemon]:
    """Such a daemon, and a model server that answers at once. The number of open files is raised to what is allowed."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory() as folder, canned("llama.cpp") as backend:
        daemon = Daemon(Path(folder), backend.port, settings)
        try:
            yield daemon
        finally:
            daemon.stop()
