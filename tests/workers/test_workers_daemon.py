"""The real daemon with two workers: one service to those who call it and to those who operate it."""

import asyncio
import itertools
import json
import os
import re
import signal
import socket
import ssl
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import test_admission_daemon
import test_daemon_reload
import test_drain_daemon
import test_kobold_daemon
from crowd import Crowd, until
from daemon import AUTH, Daemon, ModelServer, model_server, running, wait_until
from test_drain_daemon import ended, serving
from test_openai_daemon import options

pytestmark = pytest.mark.e2e


@pytest.fixture(autouse=True)
def two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Daemon, "defaults", {"WORKERS": "2", "OTEL_TRACES_EXPORTER": "none"})
    monkeypatch.setattr(test_drain_daemon, "report", report)


fake = test_kobold_daemon.fake


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with model_server() as found:
        yield found


def report(daemon: Daemon) -> dict[str, int]:
    """What the last of our lines says. A worker may answer while another has not yet said how much it has to do."""
    [line] = daemon.logged("stopped:")
    [begun] = [number for number, each in enumerate(daemon.lines) if each["message"].startswith("stopping:")]
    answered = [each for each in daemon.lines[begun:] if each["message"].startswith("POST ")]
    assert line["finished"] >= len([each for each in answered if "error" not in each])
    assert line["finished"] + line["cut"] + line["refused"] + line["left"] >= daemon.lines[begun]["count"]
    return line


# What holds for one process holds for several.

test_exactly_the_limit = test_admission_daemon.test_fifty_callers_get_the_limit_and_no_more
test_reload = test_daemon_reload.test_sighup_reads_settings_where_they_were_at_the_start
test_drain = test_drain_daemon.test_whoever_was_let_in_is_answered
test_drain_grace = test_drain_daemon.test_a_grace_period_that_is_too_short
test_drain_second_signal = test_drain_daemon.test_a_second_signal_cuts_at_once_and_the_log_says_so
test_drain_batch = test_drain_daemon.test_a_batch_says_where_it_stopped
test_drain_passed_socket = test_drain_daemon.test_restarts_with_a_socket_that_is_passed_refuse_nobody


def workers(daemon: Daemon) -> list[int]:
    """Their process ids."""
    path = f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children"
    return [int(pid) for pid in Path(path).read_text().split()]


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def metrics(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"^ai_ticket_(\S+) ([0-9.e+]+)$", text, re.MULTILINE)}


def exported(daemon: Daemon) -> dict[str, float]:
    return metrics(httpx.get(f"http://127.0.0.1:{daemon.port('metrics')}/metrics", trust_env=False).text)


REQUESTS = 'server_requests_total{method="POST",route="/event",status="200"}'


def test_one_service(tmp_path: Path, server: ModelServer) -> None:
    """Both answer; the metrics, at both places, are those of all; each line says whose it is."""
    with running(tmp_path, KOBOLDCPP_API_URL=server.url, KOBOLDCPP_SLOTS="8") as daemon:
        daemon.ready()
        assert len(workers(daemon)) == 2
        for number in range(40):
            with daemon.client(http2=bool(number % 2)) as client:
                assert client.post("/event", json={"content": "x"}, headers=AUTH).json()["completion"] == "x"
        by_worker = Counter(line["worker"] for line in daemon.logged("POST /event 200"))
        assert set(by_worker) == {0, 1}
        assert by_worker.total() == 40
        with daemon.client() as client:
            on_tls = metrics(client.get("/metrics").text)
            health = client.get("/health").json()
        assert health["status"] == "healthy"
        for found in (on_tls, exported(daemon)):
            assert found[REQUESTS] == 40
            assert found["server_workers"] == 2
            assert found['pipeline_events_total{outcome="ok"}'] == 40
            assert found["pipeline_in_flight"] == found["pipeline_queue_depth"] == 0
            [attempts] = [value for name, value in found.items() if "kobold_requests_total" in name and value]
            assert attempts == 40
        environ = Path(f"/proc/{workers(daemon)[0]}/environ").read_text()
        command = Path(f"/proc/{workers(daemon)[0]}/cmdline").read_text()
        for secret in (daemon.environ["AI_TICKET_AUTH_TOKEN"], server.url):
            assert secret not in environ + command
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert daemon.err == ""


def test_what_each_of_them_cuts_is_counted_together(tmp_path: Path, server: ModelServer) -> None:
    limits = {"HEADER_TIMEOUT_SECONDS": "1", "LOG_LEVEL": "DEBUG"}
    with running(tmp_path, KOBOLDCPP_API_URL=server.url, **limits) as daemon:
        context = ssl.create_default_context(cafile=str(daemon.ready().certificates.ca))
        with ExitStack() as silent:
            for _ in range(20):
                plain = socket.create_connection(("127.0.0.1", daemon.port("https")), timeout=30)
                silent.enter_context(context.wrap_socket(plain, server_hostname="localhost"))
            counter = 'server_connections_ended_total{reason="header_timeout"}'
            wait_until(lambda: exported(daemon)[counter] == 20, "all are cut")
        lines = daemon.logged("connection of 127.0.0.1 ended: header_timeout")
        assert len(lines) == 20
        assert {line["worker"] for line in lines} == {0, 1}


def test_openais_chunks_pass_by_the_parent(
    tmp_path: Path, server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With either worker: text, usage and tools, in pieces."""
    with running(tmp_path, KOBOLDCPP_API_URL=server.url) as daemon:
        monkeypatch.setenv("SSL_CERT_FILE", str(daemon.ready().certificates.ca))
        question: Any = [{"role": "user", "content": "hi"}]
        tool: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
        while {line["worker"] for line in daemon.logged("POST /v1/chat/completions 200")} != {0, 1}:
            with openai.OpenAI(**options(daemon)) as client:
                stream = client.chat.completions.create(
                    model="m", messages=question, stream=True, stream_options={"include_usage": True}
                )
                *chunks, last = stream
                assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hi"
                assert last.usage is not None
                assert last.usage.total_tokens == 2
                answer = client.chat.completions.create(model="m", messages=question, tools=[tool])
                assert answer.choices[0].finish_reason == "tool_calls"
        assert server.requests[-1]["tools"] == [tool]


def test_a_generation_is_watched_and_aborted_from_any_worker(tmp_path: Path, fake: str) -> None:
    """Each question comes over a connection of its own."""
    check, abort, key = "/api/extra/generate/check", "/api/extra/abort", {"genkey": "KCPP1"}
    with running(tmp_path, KOBOLDCPP_API_URL=fake) as daemon:
        daemon.ready()

        def ask(path: str) -> dict[str, Any]:
            with daemon.client() as client:
                found: dict[str, Any] = client.post(path, json=key, headers=AUTH).json()
            return found

        def text() -> str:
            found: str = ask(check)["results"][0]["text"]
            return found

        with daemon.client() as client:
            prompt = {"prompt": "some text", "max_length": 4000, "bypass_eos": True, **key}
            with client.stream("POST", "/api/extra/generate/stream", json=prompt, headers=AUTH) as stream:
                wait_until(text, "some text")
                told = [text()]
                while {line["worker"] for line in daemon.logged(f"POST {check} 200")} != {0, 1}:
                    told.append(text())
                assert all(later.startswith(before) for before, later in itertools.pairwise(told))
                assert ask(abort) == {"success": "true", "done": "true"}
                frames = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
        assert frames[-1] == {"token": "", "finish_reason": "length"}
        assert "".join(frame["token"] for frame in frames).startswith(told[-1])
        assert told[-1]
        assert text() == ""
        assert ask(abort) == {"success": "false", "done": "false"}
        wait_until(lambda: httpx.get(f"{fake}/api/extra/perf").json()["idle"], "the model server is told")
        with daemon.client() as client:
            assert client.get("/api/extra/perf", headers=AUTH).json()["total_gens"] == 1
            counted = client.post("/api/extra/tokencount", json={"prompt": "a b"}, headers=AUTH).json()
        assert counted["value"] > 0


def test_less_is_taken_on_the_shorter_the_memory_of_all_is(tmp_path: Path, server: ModelServer) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("LOG_LEVEL=INFO\n")
    with running(tmp_path, KOBOLDCPP_API_URL=server.url) as daemon:
        daemon.ready()

        def limit(share: float, level: int) -> None:
            """Make the memory in use such a share of what may be."""
            pids = [daemon.process.pid, *workers(daemon)]
            pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
            env_file.write_text(f"MEMORY_LIMIT_MB={round(sum(pages) * 4096 / 1_048_576 / share)}\n")
            daemon.signal(signal.SIGHUP)
            wait_until(lambda: exported(daemon)["overload_level"] == level, f"level {level}")
            wait_until(
                lambda: {line["worker"] for line in daemon.logged(word[level])} >= ({0, 1} if level else set()), "both"
            )

        word = {0: "served as usual", 2: "events are refused, connections closed"}
        limit(0.92, 2)
        statuses = set()
        for _ in range(8):
            with daemon.client() as client:
                answer = client.post("/event", json={"content": "x"}, headers=AUTH)
                statuses.add((answer.status_code, answer.json()["error"], client.get("/health/ready").status_code))
        assert statuses == {(503, "overloaded", 503)}
        limit(0.4, 0)
        with daemon.client() as client:
            assert client.post("/event", json={"content": "x"}, headers=AUTH).status_code == 200


def test_while_the_parent_is_late_no_worker_is_ready(tmp_path: Path, server: ModelServer) -> None:
    with running(tmp_path, KOBOLDCPP_API_URL=server.url) as daemon:
        daemon.ready()

        def overloaded() -> bool:
            with daemon.client() as client:
                ready = client.get("/health/ready")
            return ready.status_code == 503 and ready.json() == {"status": "overloaded", "reason": "lag"}

        assert not overloaded()
        for _ in range(3):
            os.kill(daemon.process.pid, signal.SIGSTOP)
            time.sleep(0.5)  # nobody but the system knows that it stands still
            os.kill(daemon.process.pid, signal.SIGCONT)
            time.sleep(0.3)  # nor that each stop shows in a probe of its own
        wait_until(overloaded, "the workers to hear of it")
        while {line["worker"] for line in daemon.logged("GET /health/ready 503")} != {0, 1}:
            overloaded()


def test_invalid_tokens_are_counted_together(tmp_path: Path, server: ModelServer) -> None:
    with running(tmp_path, KOBOLDCPP_API_URL=server.url) as daemon:
        daemon.ready()
        statuses = []
        for _ in range(30):
            with daemon.client() as client:
                statuses.append(client.post("/event", json={"content": "x"}, headers={"X-API-Key": "no"}).status_code)
        assert Counter(statuses) == {401: 10, 429: 20}


def test_slots_are_those_of_all(tmp_path: Path, server: ModelServer) -> None:
    """KoboldCPP has one: the second event waits for it in the queue, whichever worker it came to."""
    with running(tmp_path, KOBOLDCPP_API_URL=server.url) as daemon:
        daemon.ready()
        server.go.clear()

        async def run() -> None:
            async def ask() -> int:
                async with daemon.async_client() as client:
                    answer = await client.post("/event", json={"content": "x"}, headers=AUTH)
                    return answer.status_code

            asking = [asyncio.ensure_future(ask()) for _ in range(8)]
            loop = asyncio.get_running_loop()
            await until(lambda: server.requests, "the first event")
            for _ in range(20):
                found = await loop.run_in_executor(None, exported, daemon)
                if found["pipeline_queue_depth"] == 7:
                    break
            assert (found["pipeline_in_flight"], found["pipeline_queue_depth"]) == (1, 7)
            assert len(server.requests) == 1
            server.go.set()
            assert await asyncio.gather(*asking) == [200] * 8

        asyncio.run(run())


def test_a_worker_that_is_killed_is_replaced_and_loses_only_its_own(tmp_path: Path) -> None:
    """In the midst of a crowd."""

    async def run() -> None:
        async with serving(tmp_path) as (daemon, backend):
            crowd = Crowd(daemon, max_tokens=20)
            lost = 0

            async def ask() -> None:
                nonlocal lost
                while not crowd.closed_by_us:
                    try:
                        await crowd.http1(kept=True, stream=False)
                    except (ConnectionError, asyncio.IncompleteReadError, OSError):
                        lost += 1

            tasks = [asyncio.ensure_future(ask()) for _ in range(16)]
            await until(lambda: crowd.answers["200"] > 50, "some answers")
            killed, other = workers(daemon)
            os.kill(killed, signal.SIGKILL)
            await until(lambda: daemon.logged("was ended by signal 9"), "the notice of it")
            await until(lambda: len(daemon.logged("serves")) == 3, "another one")
            before = crowd.answers["200"]
            await until(lambda: crowd.answers["200"] > before + 50, "more answers")
            assert other in workers(daemon)
            assert killed not in workers(daemon)
            crowd.closed_by_us = True
            await asyncio.gather(*tasks)
            assert 0 < lost < 16, "not those of the other worker"
            assert set(crowd.answers) == {"200"}
            await until(lambda: backend.under_way == 0, "the end of what was under way")
            found = await asyncio.get_running_loop().run_in_executor(None, exported, daemon)
            assert found["pipeline_in_flight"] == 0
            daemon.signal(signal.SIGTERM)
            assert await ended(daemon) == 0

    asyncio.run(run())


def test_one_that_hangs_is_replaced(tmp_path: Path, server: ModelServer) -> None:
    with running(tmp_path, KOBOLDCPP_API_URL=server.url) as daemon:
        daemon.ready()
        os.kill(workers(daemon)[0], signal.SIGSTOP)
        wait_until(lambda: daemon.logged("hangs, and is killed"), "the notice of it")
        wait_until(lambda: len(daemon.logged("serves")) == 3, "another one")


def test_workers_end_with_their_parent(tmp_path: Path, server: ModelServer) -> None:
    with running(tmp_path, KOBOLDCPP_API_URL=server.url) as daemon:
        daemon.ready()
        found = workers(daemon)
        daemon.process.kill()
        daemon.wait()
        wait_until(lambda: not any(alive(pid) for pid in found), "the end of the workers")


def test_a_worker_goes_also_while_a_thread_waits_for_a_name_server(tmp_path: Path) -> None:
    folder = tmp_path / "slow"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import socket, sys, time\n"
        "if sys.orig_argv[-1:] == ['ai_ticket.workers']:\n"
        "    socket.getaddrinfo = lambda *asked: time.sleep(60)\n"
    )
    settings = {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}", "SHUTDOWN_GRACE_SECONDS": "1"}
    with model_server() as server:
        url = server.url.replace("127.0.0.1", "localhost")
        with running(tmp_path, KOBOLDCPP_API_URL=url, KOBOLDCPP_CONNECT_TIMEOUT_SECONDS="60", **settings) as daemon:
            with daemon.ready().client() as client, suppress(httpx.TimeoutException):
                client.post("/event", json={"content": "x"}, headers=AUTH, timeout=1)
            daemon.signal(signal.SIGTERM)
            assert daemon.wait() == 0
            assert daemon.logged("stopped:")
            assert not daemon.logged("is killed")


def test_one_that_does_not_start_ends_the_start(tmp_path: Path, server: ModelServer) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import sys\nif sys.orig_argv[-1:] == ['ai_ticket.workers']:\n    sys.exit('no worker today')\n"
    )
    paths = f"{folder}:{os.environ.get('PYTHONPATH', '')}"
    with running(tmp_path, KOBOLDCPP_API_URL=server.url, PYTHONPATH=paths) as daemon:
        assert daemon.wait() == 1
        [line] = daemon.logged("did not start")
        assert (line["level"], line["message"]) == ("CRITICAL", "worker 0 did not start: it has ended")
        assert "no worker today" in daemon.err


def test_systemd_is_told_once_all_serve_and_by_the_parent_alone(tmp_path: Path, server: ModelServer) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.settimeout(30)
        with running(tmp_path, KOBOLDCPP_API_URL=server.url, NOTIFY_SOCKET=path, WATCHDOG_USEC="1000000") as daemon:
            told: list[str] = []

            def hear(line: str) -> None:
                while not any(line in each.split("\n") for each in told):
                    told.append(manager.recv(4096).decode())

            hear("READY=1")
            assert len(daemon.logged("serves")) == 2
            hear("WATCHDOG=1")
            told.clear()
            daemon.signal(signal.SIGHUP)
            hear("READY=1")
            assert told[0].startswith("RELOADING=1")
            daemon.signal(signal.SIGTERM)
            hear("STOPPING=1")
            assert daemon.wait() == 0


def test_a_new_certificate_and_a_broken_one(tmp_path: Path, server: ModelServer) -> None:
    """All workers have the same, those included that start later."""
    with running(tmp_path, KOBOLDCPP_API_URL=server.url) as daemon:
        daemon.ready()
        port = daemon.port("https")

        def shown() -> set[bytes]:
            tls = daemon.client()._transport._pool._ssl_context  # type: ignore[attr-defined]
            found = set()
            for _ in range(12):
                with tls.wrap_socket(
                    socket.create_connection(("127.0.0.1", port)), server_hostname="127.0.0.1"
                ) as connection:
                    found.add(connection.getpeercert(binary_form=True))
            return found

        [first] = shown()
        daemon.certificates.issue()
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: daemon.logged("certificate"), "the new certificate")
        wait_until(lambda: len(shown()) == 1, "the same everywhere")
        [second] = shown()
        assert second != first
        daemon.certificates.key.write_text("rubbish")
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: daemon.logged("the certificate read last stays in force"), "the complaint")
        os.kill(workers(daemon)[0], signal.SIGKILL)
        wait_until(lambda: len(daemon.logged("serves")) == 3, "another one")
        assert shown() == {second}


def test_all_write_to_the_log_file_that_twistd_was_given(tmp_path: Path, server: ModelServer) -> None:
    log = tmp_path / "my.log"
    with running(tmp_path, "--logfile=my.log", "ai-ticket", KOBOLDCPP_API_URL=server.url) as daemon:
        wait_until(lambda: log.exists() and "is up" in log.read_text(), "the log")
        [port] = re.findall(r"listening for http on \S+ port (\d+)", log.read_text())
        url = f"http://127.0.0.1:{port}/event"
        answer = httpx.post(url, json={"content": "x"}, headers=AUTH, trust_env=False)
        assert answer.status_code == 200
        wait_until(lambda: "POST /event 200" in log.read_text(), "the access line")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert daemon.out == daemon.err == ""
