"""The real daemon, as its operators run it: over TLS, with signals, with files that change."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from daemon import (
    AUTH,
    PATIENCE,
    ROOT,
    TOKEN,
    Certificates,
    Daemon,
    ModelServer,
    model_server,
    running,
    wait_until,
)
from harness import HERE

from ai_ticket.backend import model as bundled

pytestmark = pytest.mark.e2e
CASES = json.loads((HERE / "data/events.json").read_text())


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, ModelServer]]:
    """One daemon for the tests that leave it as it is."""
    with (
        model_server() as server,
        running(tmp_path_factory.mktemp("daemon"), KOBOLDCPP_API_URL=server.url, KOBOLDCPP_SLOTS="8") as daemon,
    ):
        yield daemon.ready(), server


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with model_server() as found:
        yield found


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
def test_worked_cases(shared: tuple[Daemon, ModelServer], http2: bool) -> None:
    """Each case of the contract through TLS, the queue and a model server."""
    daemon, server = shared
    passed = 0
    with daemon.client(http2=http2) as client:
        for case in CASES:
            content_type = case.get("content_type", "application/json")
            headers = {**AUTH, **({"Content-Type": content_type} if content_type else {})}
            server.requests.clear()
            answer = client.post("/event", content=case["body"].encode(), headers=headers)
            assert answer.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
            found = answer.json()
            assert answer.status_code == case["status"], case["name"]
            if case["status"] == 200:
                [request] = server.requests
                assert request["messages"] == case["messages"], case["name"]
                assert request.items() >= case.get("options", {}).items(), case["name"]
                assert found.get("metadata") == case.get("metadata"), case["name"]
                assert found["completion"] == case["messages"][-1]["content"]
                assert request["stream"] is True
            else:
                assert server.requests == []
                assert found["error"] == case["error"], case["name"]
                assert case.get("details_mentions", "") in f"{found['details']} {found['message']}"
            passed += 1
    assert passed == len(CASES) == 60


def test_a_wrong_token_leaves_a_line_without_it(shared: tuple[Daemon, ModelServer]) -> None:
    daemon, _ = shared
    with daemon.client() as client:
        answer = client.post("/event", json={"content": "x"}, headers={"X-API-Key": "wrong-canary-99"})
    assert answer.status_code == 401
    lines = wait_until(lambda: daemon.logged("POST /event 401"), "the access line")
    assert lines[-1]["request_id"] == answer.headers["x-request-id"]
    assert "wrong-canary-99" not in daemon.out + daemon.err
    assert TOKEN not in daemon.out + daemon.err


def test_the_plain_endpoints(shared: tuple[Daemon, ModelServer]) -> None:
    daemon, _ = shared
    with daemon.client(tls=False) as client:
        assert client.get("/health").json()["status"] == "healthy"
        assert client.post("/event", json={"content": "x"}, headers=AUTH).status_code == 200
    import httpx

    exporter = f"http://127.0.0.1:{daemon.port('metrics')}"
    answer = httpx.get(f"{exporter}/metrics", trust_env=False)
    assert 'ai_ticket_server_requests_total{method="POST",route="/event",status="200"}' in answer.text
    for path in ("/health", "/event", "/"):
        assert httpx.get(exporter + path, trust_env=False).status_code == 404


def test_every_log_line_is_json_with_the_fields_of_the_contract(shared: tuple[Daemon, ModelServer]) -> None:
    daemon, _ = shared
    assert daemon.lines
    for line in daemon.lines:
        assert {"time", "level", "logger", "message"} <= set(line)
    assert daemon.err == ""


def test_the_idle_daemon_is_small(shared: tuple[Daemon, ModelServer]) -> None:
    daemon, _ = shared
    pages = int(Path(f"/proc/{daemon.process.pid}/statm").read_text().split()[1])
    assert pages * 4096 < 80 * 2**20


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
def test_many_at_a_time(shared: tuple[Daemon, ModelServer], http2: bool) -> None:
    daemon, _ = shared

    async def ask() -> list[str]:
        async with daemon.async_client(http2=http2) as client:
            sending = [client.post("/event", json={"content": f"number {n}"}, headers=AUTH) for n in range(100)]
            return [answer.json()["completion"] for answer in await asyncio.gather(*sending)]

    assert asyncio.run(ask()) == [f"number {n}" for n in range(100)]


def test_the_plugin_is_the_same_service(tmp_path: Path, server: ModelServer) -> None:
    with running(tmp_path, "ai-ticket", KOBOLDCPP_API_URL=server.url) as daemon:
        with daemon.ready().client() as client:
            assert client.post("/event", json={"content": "hi"}, headers=AUTH).json()["completion"] == "hi"
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert all("time" in line for line in daemon.lines)


def test_the_plugin_has_help() -> None:
    twistd = str(Path(sys.executable).parent / "twistd")
    found = subprocess.run(
        [twistd, "ai-ticket", "--help"], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert "ai-ticket check-config" in found.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_waits_for_what_is_in_flight(tmp_path: Path, server: ModelServer, number: signal.Signals) -> None:
    server.go.clear()
    with running(tmp_path, KOBOLDCPP_API_URL=server.url) as daemon, daemon.ready().client() as client:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.post, "/event", json={"content": "late"}, headers=AUTH)
            wait_until(lambda: server.requests, "the event at the model server")
            daemon.signal(number)
            wait_until(lambda: daemon.logged("stopping:"), "the stop")
            server.go.set()
            assert answer.result(PATIENCE).json()["completion"] == "late"
        assert daemon.wait() == 0
        [line] = daemon.logged("stopped:")
        assert (line["finished"], line["cut"]) == (1, 0)


def test_stopping_cuts_what_outlasts_the_grace_period(tmp_path: Path, server: ModelServer) -> None:
    server.go.clear()
    with (
        running(tmp_path, KOBOLDCPP_API_URL=server.url, SHUTDOWN_GRACE_SECONDS="0.3") as daemon,
        daemon.ready().client() as client,
        ThreadPoolExecutor(1) as pool,
    ):
        sending = pool.submit(client.post, "/event", json={"content": "late"}, headers=AUTH)
        wait_until(lambda: server.requests, "the event at the model server")
        daemon.signal(signal.SIGTERM)
        answer = sending.result(PATIENCE)
        assert (answer.status_code, answer.json()["error"]) == (503, "shutting_down")
        assert int(answer.headers["retry-after"]) >= 1
        assert daemon.wait() == 0
        assert daemon.logged("stopped:")[0]["cut"] == 1


def test_a_second_signal_ends_it_at_once(tmp_path: Path, server: ModelServer) -> None:
    server.go.clear()
    with (
        running(tmp_path, KOBOLDCPP_API_URL=server.url) as daemon,
        daemon.ready().client() as client,
        ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(client.post, "/event", json={"content": "late"}, headers=AUTH)
        wait_until(lambda: server.requests, "the event at the model server")
        daemon.signal(signal.SIGTERM)
        wait_until(lambda: daemon.logged("stopping:"), "the stop")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        answer.exception(PATIENCE)


def test_signals_at_its_very_end_change_nothing(tmp_path: Path, server: ModelServer) -> None:
    with running(tmp_path, KOBOLDCPP_API_URL=server.url) as daemon:
        daemon.ready().signal(signal.SIGTERM)
        wait_until(lambda: daemon.logged("stopped:"), "the end")
        numbers = cycle([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
        wait_until(lambda: daemon.process.poll() is not None or daemon.signal(next(numbers)), "the end of its process")
        assert daemon.wait() == 0


def test_a_thread_that_waits_for_ever_does_not_keep_it(tmp_path: Path, server: ModelServer) -> None:
    """Its last line is there at once, and the second signal leaves the thread no time."""
    with running(tmp_path, "-y", str(Path(__file__).with_name("stuck.tac")), KOBOLDCPP_API_URL=server.url) as daemon:
        daemon.ready().signal(signal.SIGTERM)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert daemon.logged("stopped:")


def test_a_certificate_that_is_a_pipe_holds_nothing_up(tmp_path: Path, server: ModelServer) -> None:
    with running(tmp_path, KOBOLDCPP_API_URL=server.url) as daemon:
        daemon.ready()
        daemon.certificates.certificate.unlink()
        os.mkfifo(daemon.certificates.certificate)
        daemon.signal(signal.SIGHUP)
        [line] = wait_until(lambda: daemon.logged("the certificate read last stays in force"), "the complaint")
        assert "not a regular file" in line["message"]
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0


def test_sighup_reads_tokens_and_certificate_anew(tmp_path: Path, server: ModelServer) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("bob one\n")
    with running(
        tmp_path, KOBOLDCPP_API_URL=server.url, AI_TICKET_AUTH_TOKEN="", AI_TICKET_AUTH_TOKEN_FILE=str(tokens)
    ) as daemon:

        def status(token: str) -> int:
            with daemon.client() as client:
                headers = {"X-API-Key": token}
                return client.post("/event", json={"content": "x"}, headers=headers).status_code

        def fingerprint() -> bytes:
            import ssl

            context = ssl.create_default_context(cafile=str(daemon.certificates.ca))
            with (
                socket.create_connection(("127.0.0.1", daemon.port("https"))) as raw,
                context.wrap_socket(raw, server_hostname="localhost") as secure,
            ):
                return secure.getpeercert(binary_form=True) or b""

        daemon.ready()
        assert (status("one"), status("two")) == (200, 401)
        before = fingerprint()
        tokens.write_text("bob two\n")
        daemon.certificates.issue()
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: daemon.logged("certificate") and daemon.logged("token file"), "the reload")
        assert (status("one"), status("two")) == (401, 200)
        assert fingerprint() not in (before, b"")

        tokens.write_text("")
        daemon.certificates.key.write_text("broken")
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: daemon.logged("stay in force") and daemon.logged("stays in force"), "the complaints")
        assert status("two") == 200
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0


def test_a_changed_token_file_is_noticed(tmp_path: Path, server: ModelServer) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("one\n")
    with (
        running(
            tmp_path,
            KOBOLDCPP_API_URL=server.url,
            AI_TICKET_AUTH_TOKEN="",
            AI_TICKET_AUTH_TOKEN_FILE=str(tokens),
            AI_TICKET_AUTH_TOKEN_RELOAD_INTERVAL="0.05",
        ) as daemon,
        daemon.ready().client() as client,
    ):
        tokens.write_text("two-is-longer\n")
        headers = {"X-API-Key": "two-is-longer"}
        wait_until(
            lambda: client.post("/event", json={"content": "x"}, headers=headers).status_code == 200, "the new token"
        )


def refused(folder: Path, **environ: str) -> tuple[str, str]:
    """What a daemon that does not start leaves on standard output and standard error."""
    with running(folder, **environ) as daemon:
        assert daemon.wait() == 1
        return daemon.out, daemon.err


def test_wrong_settings_end_it_before_anything_listens(tmp_path: Path) -> None:
    out, err = refused(tmp_path, TLS_CERT_FILE="/nowhere", QUEUE_LIMIT="10", LOG_LEVEL="INFO")
    assert err == "ai-ticket: TLS_CERT_FILE='/nowhere': No such file or directory\n"
    assert "listening" not in out
    _, err = refused(tmp_path, QUEUE_LIMIT="many", LOG_LEVEL="loud", AI_TICKET_AUTH_TOKEN="")
    assert [line.split("=")[0] for line in err.splitlines()] == ["ai-ticket: QUEUE_LIMIT", "ai-ticket: LOG_LEVEL"]
    _, err = refused(tmp_path, AI_TICKET_AUTH_TOKEN="")
    assert "AI_TICKET_AUTH=off" in err
    assert len(err.splitlines()) == 1
    _, err = refused(tmp_path, AI_TICKET_AUTH_TOKEN_FILE="/nowhere")
    assert err == "ai-ticket: AI_TICKET_AUTH_TOKEN_FILE='/nowhere': No such file or directory\n"
    _, err = refused(tmp_path, KOBOLDCPP_API_URL="local:/nowhere.gguf")
    assert err.startswith("ai-ticket: KOBOLDCPP_API_URL='local:/nowhere.gguf': ")


@pytest.mark.parametrize("variable", ["TLS_PORT", "HTTP_PORT", "OTEL_PROMETHEUS_PORT"])
def test_a_port_in_use_ends_it(tmp_path: Path, variable: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        out, err = refused(tmp_path, **{variable: port})
    [line] = [json.loads(line) for line in out.splitlines() if "can't listen" in line]
    assert line["level"] == "CRITICAL"
    assert line["message"] == f"{variable}={port}: can't listen on 127.0.0.1: Address already in use"
    assert "Traceback" not in out + err


def daemonised(folder: Path, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """twistd without --nodaemon: it returns when the service has started, or can't."""
    certificates = Certificates(folder)
    return subprocess.run(
        [str(Path(sys.executable).parent / "twistd"), f"--pidfile={folder}/pid", *options],
        cwd=folder,
        env={
            **{name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ},
            "BIND_HOST": "127.0.0.1",
            "TLS_PORT": "0",
            "OTEL_PROMETHEUS_PORT": "0",
            "TLS_CERT_FILE": str(certificates.certificate),
            "TLS_KEY_FILE": str(certificates.key),
            "AI_TICKET_AUTH_TOKEN": TOKEN,
            **environ,
        },
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.parametrize("command", [("ai-ticket",), ("-y", str(ROOT / "ai_ticket.tac"))], ids=["plugin", "tac"])
def test_a_port_in_use_ends_a_daemon_whose_start_is_waited_for(tmp_path: Path, command: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        found = daemonised(tmp_path, *command, TLS_PORT=port)
    assert found.returncode == 1
    assert f"TLS_PORT={port}: can't listen on 127.0.0.1: Address already in use" in found.stderr
    assert "Traceback" not in found.stderr
    lines = [json.loads(line) for line in (tmp_path / "twistd.log").read_text().splitlines()]
    assert [line["message"] for line in lines if line["level"] == "CRITICAL"] == [
        f"TLS_PORT={port}: can't listen on 127.0.0.1: Address already in use"
    ]


def test_a_daemon_logs_to_the_file_that_it_was_told(tmp_path: Path) -> None:
    found = daemonised(tmp_path, "--logfile=my.log", "ai-ticket")
    assert (found.returncode, found.stderr) == (0, "")
    log = tmp_path / "my.log"
    assert "listening for https" in log.read_text()
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    wait_until(lambda: "stopped: 0 requests finished" in log.read_text(), "the end")
    wait_until(lambda: not (tmp_path / "pid").exists(), "the end of the process")
    found = daemonised(tmp_path, "--syslog", "ai-ticket")
    assert found.returncode == 1
    assert found.stderr == "ai-ticket: --syslog: the log goes to standard output, or to the file that --logfile names\n"


def test_systemd_is_told_how_the_service_is(tmp_path: Path, server: ModelServer) -> None:
    heard: list[list[str]] = []

    def has_heard(first: str) -> list[str] | None:
        with suppress(BlockingIOError):
            while True:
                heard.append(notified.recv(4096).decode().split("\n"))
        return next((lines for lines in heard if lines[0] == first), None)

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as notified:
        notified.bind(str(tmp_path / "notify"))
        with running(
            tmp_path, KOBOLDCPP_API_URL=server.url, NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="200000"
        ) as daemon:
            wait_until(lambda: has_heard("READY=1"), "that it is ready")
            assert daemon.logged("listening for https"), "by then"
            wait_until(lambda: has_heard("WATCHDOG=1"), "that it lives")
            heard.clear()
            daemon.signal(signal.SIGHUP)
            wait_until(lambda: has_heard("READY=1"), "that it is ready again")
            told = [lines[0] for lines in heard if lines[0] != "WATCHDOG=1"]
            assert told == ["RELOADING=1", "READY=1"]
            daemon.signal(signal.SIGTERM)
            assert daemon.wait() == 0
            stopping = has_heard("STOPPING=1")
            assert stopping is not None
            assert stopping[1] == "EXTEND_TIMEOUT_USEC=150000000"


def test_a_socket_of_an_unknown_name_ends_it(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as passed,
        running(tmp_path, listening={"ai-ticket.socket": passed}) as daemon,
    ):
        assert daemon.wait() == 1
        assert daemon.logged("FileDescriptorName= must be one of http, https, metrics")


def test_unknown_variables_are_logged(tmp_path: Path, server: ModelServer) -> None:
    with running(tmp_path, KOBOLDCPP_API_URL=server.url, RATE_LIMIT_REQUEST="5") as daemon:
        daemon.ready()
        assert daemon.logged("did you mean RATE_LIMIT_REQUESTS?")


def test_a_model_server_that_is_away(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}"
    with running(tmp_path, KOBOLDCPP_API_URL=url) as daemon, daemon.client() as client:
        report = client.get("/health").json()
        assert report["status"] == "degraded"
        assert client.get("/health/ready").status_code == 503
        answer = client.post("/event", json={"content": "x"}, headers=AUTH)
        assert (answer.status_code, answer.json()["error"]) == (502, "api_connection_error")


def test_a_caller_who_leaves_frees_the_slot(tmp_path: Path, server: ModelServer) -> None:
    server.go.clear()
    with running(tmp_path, KOBOLDCPP_API_URL=server.url) as daemon, daemon.ready().client() as client:
        import httpx

        with pytest.raises(httpx.ReadTimeout):
            client.post("/event", json={"content": "leaving"}, headers=AUTH, timeout=0.5)
        wait_until(lambda: daemon.logged("POST /event 499"), "the caller's leaving")
        server.go.set()
        assert client.post("/event", json={"content": "next"}, headers=AUTH).json()["completion"] == "next"


def local_children(daemon: Daemon) -> list[int]:
    listed = Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children").read_text()
    return [int(pid) for pid in listed.split()]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(bundled.problem(None) is not None, reason=f"no bundled model: {bundled.problem(None)}")
def test_the_bundled_model_answers_and_leaves_no_orphan(tmp_path: Path) -> None:
    with running(tmp_path, KOBOLDCPP_API_URL="local:") as daemon, daemon.ready().client(http2=True) as client:
        event = {"content": "Name a colour.", "parameters": {"max_tokens": 12, "temperature": 0}}
        answer: dict[str, Any] = client.post("/event", json=event, headers=AUTH).json()
        assert answer["completion"].strip()
        assert answer["model"] == "SmolLM2-135M-Instruct.Q4_1"
        assert 0 < answer["usage"]["completion_tokens"] <= 12
        [child] = local_children(daemon)
        assert client.get("/health").json()["backends"]["local"]["status"] == "up"
        daemon.signal(signal.SIGKILL)
        daemon.wait()
        wait_until(lambda: gone(child), "the end of the model server")


@pytest.mark.skipif(bundled.problem(None) is not None, reason=f"no bundled model: {bundled.problem(None)}")
def test_the_bundled_model_ends_with_the_daemon(tmp_path: Path) -> None:
    with running(tmp_path, KOBOLDCPP_API_URL="local:") as daemon:
        [child] = wait_until(lambda: local_children(daemon), "the model server")
        daemon.ready()
        assert TOKEN not in Path(f"/proc/{child}/environ").read_text()
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert gone(child)
