"""The real daemon with too many connections, too little memory, and callers who do not speak TLS."""

import signal
import socket
import ssl
from pathlib import Path

import httpx
import pytest
from daemon import AUTH, Daemon, model_server, running, wait_until

pytestmark = pytest.mark.e2e


def metric(daemon: Daemon, name: str) -> float:
    text = httpx.get(f"http://127.0.0.1:{daemon.port('metrics')}/metrics", trust_env=False).text
    return float(next(line for line in text.splitlines() if line.startswith(name)).rpartition(" ")[2])


def open_files(daemon: Daemon) -> int:
    return len(list(Path(f"/proc/{daemon.process.pid}/fd").iterdir()))


def connect(daemon: Daemon, source: str) -> ssl.SSLSocket:
    """An idle connection that has asked for something."""
    context = ssl.create_default_context(cafile=str(daemon.certificates.ca))
    plain = socket.create_connection(("127.0.0.1", daemon.port("https")), timeout=30, source_address=(source, 0))
    found = context.wrap_socket(plain, server_hostname="localhost")
    found.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
    assert found.recv(4096).startswith(b"HTTP/1.1 200")
    return found


def is_open(connection: ssl.SSLSocket) -> bool:
    connection.setblocking(False)
    try:
        return bool(connection.recv(1))
    except ssl.SSLWantReadError:
        return True
    except OSError:
        return False


def test_idle_connections_of_one_address_make_room_for_each_other(tmp_path: Path) -> None:
    limits = {"MAX_CONNECTIONS_PER_CLIENT": "20", "MAX_CONNECTIONS": "30"}
    with running(tmp_path, KOBOLDCPP_API_URL="http://127.0.0.1:9", **limits) as daemon:
        wait_until(lambda: daemon.logged("backend 127.0.0.1:9 is down"), "all is open that is going to be")
        before = open_files(daemon)
        other = connect(daemon, "127.0.0.2")
        own = [connect(daemon, "127.0.0.1") for _ in range(60)]
        wait_until(lambda: [is_open(one) for one in own] == [False] * 40 + [True] * 20, "the oldest are closed")
        assert is_open(other)
        wait_until(lambda: open_files(daemon) == before + 21, "their files are closed")
        assert metric(daemon, "ai_ticket_server_connections ") == 21
        more = [connect(daemon, f"127.0.0.{number}") for number in range(3, 23)]
        wait_until(lambda: sum(is_open(one) for one in [other, *own, *more]) == 30, "the oldest of all are closed")
        assert not is_open(other)
        assert all(is_open(one) for one in more)
        ended = 'ai_ticket_server_connections_ended_total{reason="%s"}'
        wait_until(lambda: metric(daemon, ended % "max_connections") == 11, "they are counted")
        assert metric(daemon, ended % "max_connections_per_client") == 40
        wait_until(lambda: daemon.logged("MAX_CONNECTIONS_PER_CLIENT=20 reached"), "it is told")
        wait_until(lambda: daemon.logged("MAX_CONNECTIONS=30 reached"), "it is told")
        for one in [other, *own, *more]:
            one.close()
        wait_until(lambda: open_files(daemon) == before, "the files are closed")


def test_behind_a_proxy_all_may_come_from_one_address(tmp_path: Path) -> None:
    limits = {"MAX_CONNECTIONS_PER_CLIENT": "2", "TRUST_PROXY_COUNT": "1"}
    with running(tmp_path, KOBOLDCPP_API_URL="http://127.0.0.1:9", **limits) as daemon:
        own = [connect(daemon, "127.0.0.1") for _ in range(5)]
        assert all(is_open(one) for one in own)
        for one in own:
            one.close()


def test_callers_who_do_not_speak_tls(tmp_path: Path) -> None:
    with running(tmp_path, KOBOLDCPP_API_URL="http://127.0.0.1:9", LOG_LEVEL="DEBUG") as daemon:
        port = daemon.port("https")
        for data in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"\0" * 4000):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as plain:
                plain.sendall(data)
                plain.settimeout(30)
                while plain.recv(4096):
                    pass
        with socket.create_connection(("127.0.0.1", port)):
            pass
        wait_until(lambda: metric(daemon, 'ai_ticket_tls_handshake_failures_total{reason="closed"}') == 1, "one left")
        assert metric(daemon, 'ai_ticket_tls_handshake_failures_total{reason="protocol"}') == 3
        assert {line["level"] for line in daemon.logged("no TLS with 127.0.0.1: ")} == {"DEBUG"}
        assert daemon.logged("no TLS with 127.0.0.1: http request")
        assert "Traceback" not in daemon.out + daemon.err


def test_less_is_taken_on_the_shorter_memory_is(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("LOG_LEVEL=INFO\n")
    with model_server() as server, running(tmp_path, KOBOLDCPP_API_URL=server.url) as daemon:
        client = daemon.ready().client()
        scraper = daemon.client(tls=False)

        def limit(share: float, level: int) -> None:
            """Make the memory in use such a share of what may be."""
            used = int(Path(f"/proc/{daemon.process.pid}/statm").read_text().split()[1]) * 4096 / 1_048_576
            env_file.write_text(f"MEMORY_LIMIT_MB={round(used / share)}\n")
            daemon.signal(signal.SIGHUP)
            wait_until(lambda: metric(daemon, "ai_ticket_overload_level ") == level, f"level {level}")

        def post(path: str = "/event", content: object = {"content": "hi"}) -> httpx.Response:
            return client.post(path, json=content, headers=AUTH)

        kept = connect(daemon, "127.0.0.1")
        assert "connection" not in post().headers
        limit(0.83, 1)
        answer = post()
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert client.get("/health/ready").status_code == 200
        assert is_open(kept)
        server.go.clear()
        with client.stream("POST", "/event", json={"content": "hi", "stream": True}, headers=AUTH) as stream:
            server.go.set()
            assert "hi" in stream.read().decode()
        limit(0.92, 2)
        for path in ("/event", "/events"):
            answer = post(path, [{"content": "hi"}] if path == "/events" else {"content": "hi"})
            assert (answer.status_code, answer.json()["error"]) == (503, "overloaded")
            assert answer.headers["retry-after"] == "5"
        ready = client.get("/health/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "overloaded", "reason": "memory"})
        assert client.get("/health").json()["status"] == "degraded"
        wait_until(lambda: not is_open(kept), "idle connections are closed")
        limit(1.1, 3)
        with pytest.raises(httpx.TimeoutException):
            client.get("/health", timeout=1)
        with pytest.raises(httpx.TimeoutException):
            scraper.get("/health", timeout=1)
        limit(0.4, 0)
        assert post().status_code == 200
        assert client.get("/health/ready").status_code == 200
        assert len(daemon.logged("memory: ")) == 4
        for one in (client, scraper):
            one.close()
        kept.close()
