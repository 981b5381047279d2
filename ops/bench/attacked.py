"""A daemon to attack, for the scripts beside this: it ticks, and writes down whenever a tick came late."""

import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from telemetry_cost import free_port, serving

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

    def __init__(self, folder: Path, backend: str, settings: dict[str, str]) -> None:
        self.folder = folder
        self.plain, self.secure = free_port(), free_port()
        key = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-batch"]
        files = ["-keyout", "server.key", "-out", "server.crt"]
        subprocess.run(["openssl", "req", *key, *files], cwd=folder, check=True, capture_output=True)  # noqa: S603, S607
        (folder / "bench.tac").write_text(TAC)
        environ = {
            "KOBOLDCPP_API_URL": backend,
            "KOBOLDCPP_SLOTS": "16",
            "AI_TICKET_AUTH_TOKEN": TOKEN,
            "TLS_CERT_FILE": "server.crt",
            "TLS_KEY_FILE": "server.key",
            "TLS_PORT": str(self.secure),
            "HTTP_PORT": str(self.plain),
            "OTEL_PROMETHEUS_PORT": "0",
            "BIND_HOST": "127.0.0.1",
            "OTEL_PROMETHEUS_HOST": "127.0.0.1",
            "OTEL_TRACES_EXPORTER": "none",
            "RATE_LIMIT_REQUESTS": "0",
            **{name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ},
            **settings,
        }
        twistd = str(Path(sys.executable).parent / "twistd")
        with open(folder / "log", "w") as log:
            self.process = subprocess.Popen(  # noqa: S603
                [twistd, "--nodaemon", "--pidfile=", "-y", "bench.tac"], cwd=folder, env=environ, stdout=log, stderr=log
            )
        end = time.monotonic() + 30
        while not self._answers():
            if time.monotonic() > end or self.process.poll() is not None:
                raise SystemExit(f"the daemon does not start: {self.log}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.plain)) as connection:
                connection.sendall(b"GET /health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
                return b" 200 " in connection.recv(65_536)
        except ConnectionError:
            return False

    @property
    def log(self) -> str:
        """All that it has said."""
        return (self.folder / "log").read_text()

    @property
    def ticks(self) -> list[LateTick]:
        """Those that came late so far."""
        lines = (self.folder / "ticks").read_text().rpartition("\n")[0].splitlines()
        return [LateTick(*map(float, line.split())) for line in lines]

    @property
    def memory(self) -> int:
        """Resident, in KiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0])

    @property
    def descriptors(self) -> int:
        """How many files it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@contextmanager
def attacked(settings: dict[str, str]) -> Iterator[Daemon]:
    """Such a daemon, and a model server that answers at once. The number of open files is raised to what is allowed."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory() as folder, serving("llama.cpp") as backend:
        daemon = Daemon(Path(folder), backend, settings)
        try:
            yield daemon
        finally:
            daemon.process.kill()
            daemon.process.wait()
