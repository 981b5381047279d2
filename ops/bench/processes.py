"""Processes that are measured: started, waited for, looked at from outside, stopped. Linux only."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PAGE = os.sysconf("SC_PAGE_SIZE")
CERTIFICATE, KEY = "server.crt", "server.key"


OBSERVED = ("--python", str(HERE / "observed.tac"))
"""Arguments for twistd: the daemon that can be asked for more than the product tells."""


@dataclass(frozen=True)
class Target:
    """A server as its callers and observers see it; `certificate` is to be trusted where it speaks TLS."""

    port: int
    pid: int
    certificate: Path | None = None


class NotStarted(Exception):
    """A process that ended, or did not answer in time; the text says why in one line."""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


def make_certificate(folder: Path) -> None:
    """A key and a certificate for localhost, signed by itself."""
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-batch"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", KEY, "-out", CERTIFICATE]
    subprocess.run(["openssl", "req", *kind, *names, *files], cwd=folder, check=True, capture_output=True)  # noqa: S603, S607


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """These variables, and of ours only what a program needs to be found and to start."""
    kept = ("PATH", "HOME", "PYTHONPATH", "LANG", "TMPDIR")
    return {**{name: os.environ[name] for name in kept if name in os.environ}, **settings}


def _tree(pid: int) -> list[int]:
    """A process and those below it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it has ended meanwhile
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def cpu_seconds(pid: int) -> float:
    """What a process and those below it have taken so far, the kernel's time on their behalf included.

    By the clock that each process has, in nanoseconds: /proc/PID/stat counts the same in steps of 10 ms.
    """
    spent = 0
    for one in _tree(pid):
        with suppress(OSError):
            spent += time.clock_gettime_ns((~one << 3) | 2)  # clock_getcpuclockid(3)
    return spent / 1e9


def resident_bytes(pid: int) -> int:
    """The memory of a process and those below it. Pages that several share are counted for each."""
    total = 0
    for one in _tree(pid):
        with suppress(OSError):
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * PAGE
    return total


def open_files(pid: int) -> int:
    """How many files and sockets a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


class Running:
    """A server that has been started and answers."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        folder: Path,
        environ: Mapping[str, str],
        port: int,
        ready: str,
        tls: bool = False,
        patience: float = 60.0,
    ) -> None:
        """@param ready: the path that answers 200 once it serves.

        @raise NotStarted: it does not.
        """
        self._certificate = folder / CERTIFICATE if tls else None
        self._port = port
        self._log = folder / "log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(  # noqa: S603
                [str(part) for part in command],
                cwd=folder,
                env=dict(environ),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        end = time.monotonic() + patience
        while not self._answers(ready):
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise NotStarted(self._last_words())
            time.sleep(0.1)

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[:200] if lines else "it said nothing"

    def _answers(self, path: str) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self._port), 5) as connection:
                if self._certificate is not None:
                    context = ssl.create_default_context(cafile=self._certificate)
                    connection = context.wrap_socket(connection, server_hostname="localhost")  # noqa: PLW2901
                connection.sendall(b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % path.encode())
                return connection.recv(4096).startswith((b"HTTP/1.1 200 ", b"HTTP/1.0 200 "))
        except OSError:
            return False

    @property
    def target(self) -> Target:
        """What to measure."""
        return Target(self._port, self.process.pid, self._certificate)

    def stop(self) -> float:
        """Stop it; how many seconds that took."""
        began = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return time.monotonic() - began


@contextmanager
def canned(kind: str) -> Iterator[Target]:
    """A server that answers from memory: `koboldcpp`, `llama.cpp` or `collector`."""
    command = [sys.executable, str(HERE / "backend.py"), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            assert process.stdout is not None  # noqa: S101
            yield Target(int(process.stdout.readline()), process.pid)
        finally:
            process.kill()


TELEMETRY_OFF = {"OTEL_TRACES_EXPORTER": "none", "LOG_LEVEL": "ERROR"}
SAMPLED = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.1"}


def telemetry_on(collector: int) -> dict[str, str]:
    """The settings for one trace in ten, posted to a collector on this port."""
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector}", **SAMPLED}


def start_ai_ticket(
    folder: Path,
    backend: str,
    settings: Mapping[str, str],
    *,
    tls: bool = False,
    arguments: Sequence[str] = ("ai-ticket",),
) -> Running:
    """The daemon of this environment with authentication, limits and queue on, and what else the settings say.

    @param arguments: for twistd, in place of our plugin.
    @raise NotStarted: it does not start.
    """
    make_certificate(folder)
    port, other = free_port(), free_port()
    environ = environment(
        {
            "KOBOLDCPP_API_URL": backend,
            "AI_TICKET_AUTH_TOKEN": "bench",
            "TLS_CERT_FILE": CERTIFICATE,
            "TLS_KEY_FILE": KEY,
            "TLS_PORT": str(port if tls else other),
            "HTTP_PORT": str(other if tls else port),
            "OTEL_PROMETHEUS_PORT": "0",
            "BIND_HOST": "127.0.0.1",
            "OTEL_PROMETHEUS_HOST": "127.0.0.1",
            "RATE_LIMIT_REQUESTS": "1000000",
            "MAX_CONNECTIONS_PER_CLIENT": "10000",
            **settings,
        }
    )
    command = [Path(sys.executable).parent / "twistd", "--nodaemon", "--pidfile=", *arguments]
    return Running(command, folder=folder, environ=environ, port=port, ready="/health/ready", tls=tls)
