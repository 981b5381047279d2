"""`ops/nginx/ai-ticket.conf`: a real nginx in front of the real daemon, where there is one on this machine."""

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import httpx
import pytest
from daemon import AUTH, PATIENCE, TOKEN, Daemon, running, wait_until
from threaded_server import Answers, ThreadedServer

from ai_ticket.settings import DEFAULTS

ROOT = Path(__file__).parents[2]
CONF = ROOT / "ops" / "nginx" / "ai-ticket.conf"
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
QUOTA = 20
NDJSON = {"Content-Type": "application/x-ndjson", "Accept": "application/x-ndjson"}

needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian: nginx-light)")


def seconds(directive: str) -> int:
    found = re.findall(rf"^\s*{directive} (\d+)s;", CONF.read_text(), re.MULTILINE)
    assert len(found) == 1, directive
    return int(found[0])


def test_nginx_waits_longer_than_an_event_may_take() -> None:
    assert seconds("proxy_read_timeout") > DEFAULTS.request_timeout_seconds
    assert seconds("proxy_send_timeout") > DEFAULTS.request_timeout_seconds
    assert seconds("client_body_timeout") > DEFAULTS.request_timeout_seconds


def test_nginx_keeps_connections_as_long_as_the_daemon_does() -> None:
    assert seconds("keepalive_timeout") == DEFAULTS.keepalive_timeout_seconds
    assert seconds("client_header_timeout") == DEFAULTS.header_timeout_seconds


class Stepwise:
    """A model server that says `step` for each `go.release()`, three times, and notes who has left before."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.began = threading.Semaphore(0)
        self.left = threading.Event()
        model = self

        class Handler(Answers):
            def do_GET(self) -> None:
                answers = {"/api/extra/version": {"result": "KoboldCpp", "version": "1.115.1", "llm": True}}
                found = answers.get(self.path)
                self.send_response(200 if found else 404)
                self.end_headers()
                self.wfile.write(json.dumps(found).encode())

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.end_headers()
                model.began.release()
                for _ in range(3):
                    while not model.go.acquire(timeout=0.05):
                        self.connection.setblocking(False)
                        with suppress(BlockingIOError):
                            if not self.received():
                                model.left.set()
                                return
                        self.connection.setblocking(True)
                    self.say({"choices": [{"delta": {"content": "step "}, "finish_reason": None}]})
                self.say({"choices": [{"delta": {}, "finish_reason": "stop"}]})
                self.wfile.write(b"data: [DONE]\n\n")

            def received(self) -> bytes:
                try:
                    return self.connection.recv(1)
                except ConnectionResetError:
                    return b""

            def say(self, event: dict[str, Any]) -> None:
                self.connection.setblocking(True)
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

        self._server = ThreadedServer(Handler)
        self.url = f"http://127.0.0.1:{self._server.port}"

    def close(self) -> None:
        self.go.release(1000)
        self._server.close()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@dataclass
class Front:
    """nginx with our file, in a folder of its own, before a daemon."""

    folder: Path
    port: int
    ca: Path
    process: subprocess.Popen[bytes]

    def client(self, *, http2: bool = False, local_address: str | None = None) -> httpx.Client:
        verify = ssl.create_default_context(cafile=str(self.ca))
        transport = httpx.HTTPTransport(verify=verify, http1=not http2, http2=http2, local_address=local_address)
        return httpx.Client(base_url=f"https://127.0.0.1:{self.port}", transport=transport, timeout=PATIENCE)

    def connect(self, protocol: str) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=str(self.ca))
        context.set_alpn_protocols([protocol])
        plain = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        return context.wrap_socket(plain, server_hostname="127.0.0.1")


def written(folder: Path, http_port: int, port: int, daemon: Daemon) -> Path:
    """A whole configuration around ours, with ports, certificate and log of the test."""
    site = CONF.read_text()
    for old, new in (
        ("127.0.0.1:8080", f"127.0.0.1:{http_port}"),
        ("listen 8443 ", f"listen 127.0.0.1:{port} "),
        ("    listen [::]:8443 ssl http2;\n", ""),
        ("/etc/ai-ticket/certs/server.crt", str(daemon.certificates.certificate)),
        ("/etc/ai-ticket/certs/server.key", str(daemon.certificates.key)),
        ("/var/log/nginx/access.log", str(folder / "access.log")),
    ):
        assert site.count(old) == 1, old
        site = site.replace(old, new)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    user = "user root;\n" if os.geteuid() == 0 else ""
    main = folder / "nginx.conf"
    main.write_text(
        f"{user}worker_processes 1;\npid {folder}/nginx.pid;\nerror_log {folder}/error.log;\n"
        f"events {{}}\nhttp {{\n{temporary}{site}}}\n"
    )
    return main


@pytest.fixture
def model() -> Iterator[Stepwise]:
    found = Stepwise()
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def daemon(tmp_path: Path, model: Stepwise) -> Iterator[Daemon]:
    environ = {"KOBOLDCPP_API_URL": model.url, "KOBOLDCPP_SLOTS": "4", "RATE_LIMIT_REQUESTS": str(QUOTA)}
    with running(tmp_path, **environ, TRUST_PROXY_COUNT="1", HTTP_PORT=str(free_port())) as found:
        yield found.ready()


@pytest.fixture
def front(tmp_path: Path, daemon: Daemon) -> Iterator[Front]:
    assert NGINX is not None
    folder = tmp_path / "nginx"
    folder.mkdir()
    port = free_port()
    conf = written(folder, daemon.port("http"), port, daemon)
    command = [NGINX, "-p", str(folder), "-c", str(conf)]
    tested = subprocess.run([*command, "-t", "-q"], capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stderr  # newer ones warn of a directive that older ones need
    with subprocess.Popen([*command, "-g", "daemon off;"]) as process:
        try:
            found = Front(folder, port, daemon.certificates.ca, process)
            wait_until(lambda: _answers(found), "nginx listening")
            yield found
        finally:
            process.terminate()


def _answers(front: Front) -> bool:
    with suppress(OSError):
        front.connect("http/1.1").close()
        return True
    return False


class Stream:
    """A POST over HTTP/2 whose body is sent by hand, while the answer comes."""

    def __init__(self, front: Front, path: str, head: dict[str, str]) -> None:
        self.connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
        self.status, self.body, self.ended = b"", b"", False
        self._socket = front.connect("h2")
        self.connection.initiate_connection()
        pseudo = {":method": "POST", ":scheme": "https", ":authority": "localhost", ":path": path}
        self.connection.send_headers(
            1, [*pseudo.items(), *((name.lower(), value) for name, value in {**head, **AUTH}.items())]
        )

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def receive_until(self, true: Callable[[], bool]) -> None:
        while not true():
            assert not self.ended
            self._socket.sendall(self.connection.data_to_send())
            for event in self.connection.receive_data(self._socket.recv(65536)):
                if isinstance(event, h2.events.ResponseReceived):
                    self.status = dict(event.headers)[b":status"]
                elif isinstance(event, h2.events.DataReceived):
                    self.body += event.data
                elif isinstance(event, h2.events.StreamEnded | h2.events.StreamReset):
                    self.ended = True


def post(client: httpx.Client, path: str, size: int) -> httpx.Response:
    """Post an event, or a batch of one, in a body of so many bytes."""
    head, tail = (b"[", b"]") if path == "/events" else (b"", b"")
    head, tail = head + b'{"content": "Go.", "ignored": "', b'"}' + tail
    body = head + b"x" * (size - len(head) - len(tail)) + tail
    return client.post(path, content=body, headers={**AUTH, "Content-Type": "application/json"})


def deltas(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


@needs_nginx
@pytest.mark.e2e
class TestBehindNginx:
    @pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
    def test_a_stream_comes_as_it_is_made(self, front: Front, model: Stepwise, http2: bool) -> None:
        """Each piece has come before the model makes the next."""
        body = {"content": "Go.", "stream": True}
        model.go.release()  # the answer's head comes with the first token
        with front.client(http2=http2) as client, client.stream("POST", "/event", json=body, headers=AUTH) as answer:
            pieces = deltas(answer)
            assert answer.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
            assert answer.status_code == 200
            assert next(pieces)["delta"] == "step "
            for _ in range(2):
                model.go.release()
                assert next(pieces)["delta"] == "step "
            assert next(pieces)["done"] is True

    def test_a_client_is_the_address_that_nginx_saw(self, front: Front) -> None:
        """Whatever the caller claims in X-Forwarded-For: quotas are counted for the other."""
        statuses = []
        for number in range(QUOTA + 1):
            with front.client(local_address="127.0.0.7") as client:
                claimed = {**AUTH, "X-Forwarded-For": f"203.0.113.{number}"}
                statuses.append(client.post("/event", json={"content": 5}, headers=claimed).status_code)
        assert statuses == [422] * QUOTA + [429]
        with front.client(local_address="127.0.0.8") as client:
            assert client.post("/event", json={"content": 5}, headers=AUTH).status_code == 422

    def test_a_batch_is_answered_while_it_is_sent_over_http1(self, front: Front, model: Stepwise) -> None:
        model.go.release(3 * 3)
        with front.connect("http/1.1") as caller, caller.makefile("rb") as reader:
            head = {**NDJSON, **AUTH, "Host": "localhost", "Transfer-Encoding": "chunked"}
            lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
            caller.sendall(f"POST /events HTTP/1.1\r\n{lines}\r\n".encode())
            for index in range(3):
                event = b'{"content": "Go."}\n'
                caller.sendall(b"%x\r\n%s\r\n" % (len(event), event))
                while not (line := reader.readline()).startswith(b"{"):
                    assert line, "the answer ended"
                assert (
                    json.loads(line).items() >= {"index": index, "status": 200, "completion": "step step step "}.items()
                )
            caller.sendall(b"0\r\n\r\n")

    def test_a_batch_is_answered_while_it_is_sent_over_http2(self, front: Front, model: Stepwise) -> None:
        model.go.release(3 * 3)
        with Stream(front, "/events", NDJSON) as stream:
            for index in range(3):
                stream.connection.send_data(1, b'{"content": "Go."}\n')
                stream.receive_until(lambda index=index: stream.body.count(b"\n") > index)
            for index, line in enumerate(stream.body.splitlines()):
                assert json.loads(line).items() >= {"index": index, "status": 200}.items()

    def test_a_body_that_says_it_is_too_large_is_refused_before_it_comes(self, front: Front) -> None:
        head = {"Content-Type": "application/json", "Content-Length": str(DEFAULTS.max_body_bytes + 1)}
        with Stream(front, "/event", head) as stream:
            stream.receive_until(lambda: stream.ended)
            assert stream.status == b"413"
            assert json.loads(stream.body)["error"] == "payload_too_large"

    @pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
    def test_bodies_up_to_the_limits_pass(self, front: Front, model: Stepwise, http2: bool) -> None:
        model.go.release(1000)
        with front.client(http2=http2) as client:
            assert post(client, "/event", DEFAULTS.max_body_bytes).status_code == 200
            assert post(client, "/events", DEFAULTS.max_batch_body_bytes).status_code == 200

    def test_larger_ones_are_refused(self, front: Front) -> None:
        for path, size in (
            ("/event", DEFAULTS.max_body_bytes + 1),
            ("/events", DEFAULTS.max_batch_body_bytes + 1),
            ("/events", 3 * DEFAULTS.max_batch_body_bytes),
        ):
            with front.client() as client:
                answer = post(client, path, size)
            assert (answer.status_code, answer.json()["error"]) == (413, "payload_too_large")

    def test_a_caller_who_leaves_stops_the_generation(self, front: Front, model: Stepwise) -> None:
        body = {"content": "Go.", "stream": True}
        model.go.release()  # the answer's head comes with the first token
        with front.client() as client, client.stream("POST", "/event", json=body, headers=AUTH) as answer:
            next(deltas(answer))
        assert model.left.wait(PATIENCE)

    def test_a_restart_finishes_what_is_in_flight(self, front: Front, daemon: Daemon, model: Stepwise) -> None:
        """While the daemon is away, callers are told when to try again, and then they are served."""
        with front.client() as client, ThreadPoolExecutor(1) as pool:
            before = pool.submit(client.post, "/event", json={"content": "Go."}, headers=AUTH)
            assert model.began.acquire(timeout=PATIENCE)
            daemon.signal(signal.SIGTERM)
            wait_until(lambda: client.get("/health").status_code == 503, "the drain")
            model.go.release(3)
            assert before.result(PATIENCE).json()["completion"] == "step step step "
            assert daemon.wait() == 0
            away = client.post("/event", json={"content": "Go."}, headers=AUTH)
            assert away.status_code == 503
            assert away.headers["retry-after"] == "2"
            assert away.json().keys() == {"error", "message", "details", "request_id"}
            folder = daemon.folder / "again"
            folder.mkdir()
            environ = {name: daemon.environ[name] for name in ("KOBOLDCPP_API_URL", "KOBOLDCPP_SLOTS", "HTTP_PORT")}
            with running(folder, **environ, TRUST_PROXY_COUNT="1") as second:
                second.ready()
                model.go.release(3)
                assert client.post("/event", json={"content": "Go."}, headers=AUTH).status_code == 200

    def test_nginx_logs_json_and_no_token(self, front: Front) -> None:
        with front.client() as client:
            client.get('/health?a="b', headers=AUTH)
        log = front.folder / "access.log"
        line = wait_until(lambda: log.exists() and log.read_text(), "a line")
        assert json.loads(line).items() >= {"method": "GET", "path": "/health", "status": "200"}.items()
        assert TOKEN not in line
