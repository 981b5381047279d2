"""A service for the command line to call: a Twisted server on this machine, with a certificate of a test authority."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
import trustme
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.ssl import PrivateCertificate
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request, Site

from ai_ticket.settings import variables


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings but the test's own, and a working directory with nothing in it."""
    for name in {*variables(), "AI_TICKET_ENV_FILE", "KOBOLDCPP_PASSWORD_FILE", "REDIS_URL_FILE"}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


class Service(Resource):
    """Answers every request with what a test has put into `answer`, and keeps what was asked."""

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Request] = []
        self.bodies: list[Any] = []
        self.asked: Deferred[Request] = Deferred()
        self.answer: Callable[[Request], bytes | int] = lambda request: b"{}"
        self.url = ""

    def replies(self, status: int, fields: Any, **headers: str | bytes) -> None:
        """Answer with this object, or these bytes."""
        body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()

        def answer(request: Request) -> bytes:
            request.setResponseCode(status)
            request.setHeader("Content-Type", "application/json")
            for name, value in headers.items():
                request.setHeader(name.replace("_", "-"), value)
            return body

        self.answer = answer

    def is_silent(self, start: bytes = b"") -> None:
        """Answer with no more than the start of a body, if that."""

        def answer(request: Request) -> int:
            request.notifyFinish().addErrback(lambda _: None)
            if start:
                request.setHeader("Content-Length", "1000")
                request.write(start)
            return NOT_DONE_YET

        self.answer = answer

    def render(self, request: Request) -> bytes | int:
        self.requests.append(request)
        content = request.content.read()
        self.bodies.append(json.loads(content) if content else None)
        if not self.asked.called:
            self.asked.callback(request)
        return self.answer(request)


class _Connection(ProtocolWrapper):
    def connectionLost(self, reason: Failure) -> None:
        super().connectionLost(reason)
        if self.factory.idle is not None and not self.factory.protocols:
            self.factory.idle.callback(None)


class _Counted(WrappingFactory):
    """Tells when the last connection has gone."""

    protocol = _Connection
    idle: Deferred[None] | None = None


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def cacert(authority: trustme.CA, tmp_path: Path) -> str:
    path = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


@pytest.fixture(scope="session")
def identity(authority: trustme.CA) -> trustme.LeafCert:
    return authority.issue_cert("localhost", "127.0.0.1", "::1")


def pem(identity: trustme.LeafCert) -> bytes:
    return identity.private_key_pem.bytes() + identity.cert_chain_pems[0].bytes()


@pytest_twisted.async_yield_fixture
async def service(identity: trustme.LeafCert) -> Iterator[Service]:
    """The service, over TLS; its `url` has its port."""
    service = Service()
    site = Site(service)
    site.displayTracebacks = False
    factory = _Counted(site)
    options = PrivateCertificate.loadPEM(pem(identity)).options()
    port = reactor.listenSSL(0, factory, options, interface="127.0.0.1")
    service.url = f"https://localhost:{port.getHost().port}"
    yield service
    await port.stopListening()
    if factory.protocols:
        factory.idle = Deferred()
        for protocol in list(factory.protocols):
            protocol.transport.abortConnection()
        await factory.idle


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts `ai-ticket` in a process of its own, with the test's environment."""
    started: list[subprocess.Popen] = []

    def start(*arguments: str, **options: Any) -> subprocess.Popen:
        script = "import sys; from ai_ticket.cli import main; sys.exit(main())"
        package = str(Path(__file__).parents[2])
        settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        environment = {**os.environ, "PYTHONPATH": package}
        started.append(subprocess.Popen([sys.executable, "-c", script, *arguments], env=environment, **settings))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
