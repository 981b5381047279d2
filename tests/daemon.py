"""The real daemon in a process of its own, and a model server that plays a script, for end-to-end tests."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import httpx
import trustme
from threaded_server import Answers, ThreadedServer

ROOT = Path(__file__).parent.parent
PATIENCE = 30.0
TOKEN = "a-canary-token-Zq81"
AUTH = {"Authorization": f"Bearer {TOKEN}"}

PASS_SOCKETS = """
import os, sys
for number, passed in enumerate(sys.argv[1].split(), 3):
    os.dup2(int(passed), number)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Becomes a program that gets sockets as systemd passes them."""


def wait_until(true: Callable[[], Any], what: str) -> Any:
    """Wait for something that another process does."""
    end = time.monotonic() + PATIENCE
    pause = threading.Event()
    while time.monotonic() < end:
        found = true()
        if found:
            return found
        pause.wait(0.02)
    raise AssertionError(f"in vain: {what}")


@dataclass
class Certificates:
    """An authority, and certificates of it in files."""

    folder: Path
    authority: trustme.CA = field(default_factory=trustme.CA)

    def __post_init__(self) -> None:
        self.ca = self.folder / "ca.pem"
        self.authority.cert_pem.write_to_path(self.ca)
        self.certificate, self.key = self.folder / "server.crt", self.folder / "server.key"
        self.issue()

    def issue(self) -> None:
        """A new certificate in the place of the old."""
        issued = self.authority.issue_cert("localhost", "127.0.0.1")
        self.certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        self.key.touch(0o600)
        issued.private_key_pem.write_to_path(self.key)


class Daemon:
    """`twistd` with our .tac, or our plugin; `listening` are sockets that it gets as systemd passes them, by name.

    `defaults` are variables of all of them.
    """

    defaults: ClassVar[dict[str, str]] = {}

    def __init__(
        self, folder: Path, *command: str, listening: Mapping[str, socket.socket] | None = None, **environ: str
    ):
        self.folder = folder
        self.certificates = Certificates(folder)
        base = {
            name: os.environ[name]
            for name in ("PATH", "HOME", "LANG", "PYTHONPATH", "XDG_CACHE_HOME")
            if name in os.environ
        }
        self.environ = {
            **base,
            "BIND_HOST": "127.0.0.1",
            "TLS_PORT": "0",
            "HTTP_PORT": "0",
            "OTEL_PROMETHEUS_HOST": "127.0.0.1",
            "OTEL_PROMETHEUS_PORT": "0",
            "TLS_CERT_FILE": str(self.certificates.certificate),
            "TLS_KEY_FILE": str(self.certificates.key),
            "AI_TICKET_AUTH_TOKEN": TOKEN,
            "RATE_LIMIT_REQUESTS": "0",
            **self.defaults,
            **environ,
        }
        twistd = str(Path(sys.executable).parent / "twistd")
        self._out = open(folder / "out.log", "w")  # noqa: SIM115
        self._err = open(folder / "err.log", "w")  # noqa: SIM115
        passing: list[str] = []
        if listening:
            passing = [sys.executable, "-c", PASS_SOCKETS, " ".join(str(each.fileno()) for each in listening.values())]
            self.environ |= {"LISTEN_FDS": str(len(listening)), "LISTEN_FDNAMES": ":".join(listening)}
        self.process = subprocess.Popen(
            [*passing, twistd, "--nodaemon", "--pidfile=", *(command or ("-y", str(ROOT / "ai_ticket.tac")))],
            cwd=folder,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            pass_fds=[each.fileno() for each in listening.values()] if listening else (),
        )

    @property
    def out(self) -> str:
        return (self.folder / "out.log").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err.log").read_text()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The log so far, without a line that is being written."""
        whole = self.out.rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def logged(self, text: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if text in line["message"]]

    def port(self, endpoint: str) -> int:
        """The port that an endpoint listens on, once it does."""

        def found() -> int | None:
            assert self.process.poll() is None, f"the daemon has ended: {self.out}{self.err}"
            lines = [line for line in self.logged("listening for") if line["endpoint"] == endpoint]
            return lines[0]["port"] if lines else None

        port: int = wait_until(found, f"listening for {endpoint}")
        return port

    def ready(self) -> "Daemon":
        with self.client() as client:
            wait_until(lambda: client.get("/health/ready").status_code == 200, f"readiness: {self.out}{self.err}")
        return self

    def client(self, *, http2: bool = False, tls: bool = True) -> httpx.Client:
        return httpx.Client(**self._options(http2, tls))

    def async_client(self, *, http2: bool = False) -> httpx.AsyncClient:
        return httpx.AsyncClient(**self._options(http2, True))

    def _options(self, http2: bool, tls: bool) -> dict[str, Any]:
        return {
            "base_url": f"https://127.0.0.1:{self.port('https')}" if tls else f"http://127.0.0.1:{self.port('http')}",
            "verify": ssl.create_default_context(cafile=str(self.certificates.ca)),
            "http2": http2,
            "http1": not http2,
            "timeout": PATIENCE,
            "trust_env": False,
        }

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        self._out.close()
        self._err.close()


class ModelServer:
    """A model server on a port of its own: it echoes the last user message as a stream, or waits to be let go.

    Of a user who offers tools it calls the first.
    """

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.go = threading.Event()
        self.go.set()
        model = self

        class Handler(Answers):
            def do_GET(self) -> None:
                answers = {
                    "/api/extra/version": {"result": "KoboldCpp", "version": "1.115.1", "llm": True},
                    "/v1/models": {"data": [{"id": "koboldcpp/echo"}]},
                    "/api/extra/true_max_context_length": {"value": 4096},
                }
                found = answers.get(self.path)
                body = json.dumps(found).encode()
                self.send_response(200 if found else 404)
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path.endswith("/tokencount"):
                    self.send_response(200)
                    self.end_headers()
                    self.wfile.write(b'{"value": 5}')
                    return
                model.requests.append(request)
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.end_headers()
                model.go.wait(PATIENCE)
                messages = request["messages"]
                text = [message["content"] for message in messages if message["role"] == "user"][-1]
                calls = "tools" in request and messages[-1]["role"] == "user"
                delta = {"tool_calls": model.calls(request["tools"][0])} if calls else {"content": text}
                events = (
                    {"choices": [{"index": 0, "delta": delta, "finish_reason": None}], "model": "koboldcpp/echo"},
                    {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls" if calls else "stop"}]},
                    {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}},
                )
                stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
                with suppress(ConnectionError):  # the caller may have left
                    self.wfile.write(stream.encode())

        self._server = ThreadedServer(Handler)
        self.url = f"http://127.0.0.1:{self._server.port}/api"

    @staticmethod
    def calls(tool: dict[str, Any]) -> list[dict[str, Any]]:
        function = {"name": tool["function"]["name"], "arguments": json.dumps({"city": "Paris"})}
        return [{"index": 0, "id": "call_1", "type": "function", "function": function}]

    def close(self) -> None:
        self.go.set()
        self._server.close()


@contextmanager
def running(
    folder: Path, *command: str, listening: Mapping[str, socket.socket] | None = None, **environ: str
) -> Iterator[Daemon]:
    daemon = Daemon(folder, *command, listening=listening, **environ)
    try:
        yield daemon
    finally:
        daemon.close()


@contextmanager
def model_server() -> Iterator[ModelServer]:
    server = ModelServer()
    try:
        yield server
    finally:
        server.close()
