"""KoboldCPP's clients against the real daemon, with a fake KoboldCPP behind it."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from daemon import AUTH, ROOT, TOKEN, Daemon, wait_until
from kobold_clients import LITE, TAVERN, TAVERN_TEXT

pytestmark = pytest.mark.e2e
OTHER = {"Authorization": "Bearer another-token"}
GENERATE, CHECK, ABORT = "/api/v1/generate", "/api/extra/generate/check", "/api/extra/abort"


@pytest.fixture(scope="module")
def fake() -> Iterator[str]:
    """The address of a fake KoboldCPP that writes ten words a second."""
    command = "import sys; from ai_ticket.cli import main; sys.exit(main())"
    options = ("--port", "0", "--tokens-per-second", "10", "--first-token-seconds", "0.05", "--context", "65536")
    process = subprocess.Popen(
        [sys.executable, "-c", command, "fake-backend", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def daemon(fake: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(
        tmp_path_factory.mktemp("daemon"),
        KOBOLDCPP_API_URL=fake,
        AI_TICKET_AUTH_TOKEN=f"{TOKEN},another-token",
        OTEL_TRACES_EXPORTER="none",
        CORS_ALLOW_ORIGINS="https://lite.koboldai.net",
    )
    yield daemon.ready()
    daemon.close()


def text(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    [result] = answer.json()["results"]
    return str(result["text"])


@pytest.mark.parametrize("asked", [LITE, TAVERN], ids=["lite", "tavern"])
def test_clients_with_their_defaults(daemon: Daemon, asked: dict[str, Any]) -> None:
    with daemon.client() as client:
        assert client.get("/api/extra/version", headers=AUTH).json()["result"] == "KoboldCpp"
        whole = client.post(GENERATE, json=asked | {"max_length": 4}, headers=AUTH)
        assert len(text(whole).split()) == 4
        assert whole.json()["results"][0]["finish_reason"] == "length"
        stream = client.post("/api/extra/generate/stream", json=asked | {"max_length": 4}, headers=AUTH).text
        events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: ")]
        assert "".join(event["token"] for event in events) == text(whole)
        assert events[-1] == {"token": "", "finish_reason": "length"}


def test_tavern_at_openais_surface(daemon: Daemon) -> None:
    with daemon.client() as client:
        asked = TAVERN_TEXT | {"max_tokens": 4, "stop": []}
        *chunks, done = client.post("/v1/completions", json=asked, headers=AUTH).text.split("\n\n")[:-1]
        assert done == "data: [DONE]"
        pieces = [json.loads(chunk.removeprefix("data: "))["choices"][0] for chunk in chunks]
        assert pieces[-1]["finish_reason"] == "length"
        whole = client.post("/v1/completions", json=asked | {"stream": False}, headers=AUTH).json()
        [choice] = whole["choices"]
        assert (len(choice["text"].split()), choice["finish_reason"]) == (4, "length")
        assert "".join(piece["text"] for piece in pieces) == choice["text"]


def test_a_generation_is_watched_and_aborted(daemon: Daemon, fake: str) -> None:
    """By its own client, also at the model server; by nobody else."""
    answers = []

    def generate() -> None:
        with daemon.client() as client:
            answers.append(client.post(GENERATE, json=LITE | {"max_length": 4000, "bypass_eos": True}, headers=AUTH))

    caller = threading.Thread(target=generate)
    caller.start()
    with daemon.client() as client:
        key = {"genkey": LITE["genkey"]}
        wait_until(lambda: text(client.post(CHECK, json=key, headers=AUTH)), "some text")
        assert text(client.get(CHECK, headers=OTHER)) == text(client.post(CHECK, json=key, headers=OTHER)) == ""
        nobodys = client.post(ABORT, json=key, headers=OTHER).json()
        assert nobodys == {"success": "false", "done": "false"}
        so_far = text(client.post(CHECK, json=key, headers=AUTH))
        assert client.post(ABORT, json=key, headers=AUTH).json() == {"success": "true", "done": "true"}
        caller.join(10)
        assert text(answers[0]).startswith(so_far)
        wait_until(lambda: httpx.get(f"{fake}/api/extra/perf").json()["idle"], "the model server is told")


def test_tokens_are_counted_while_it_generates(daemon: Daemon) -> None:
    with daemon.client() as client, daemon.client() as other:
        with client.stream("POST", "/event", json={"content": "x", "stream": True}, headers=AUTH) as stream:
            next(stream.iter_bytes())
            counted = other.post("/api/extra/tokencount", json={"prompt": "hello world"}, headers=AUTH).json()
        assert (counted["value"], len(counted["ids"]), counted["prompt"]) == (3, 3, "hello world")


@pytest.mark.parametrize("http2", [False, True])
def test_a_page_of_lite(daemon: Daemon, http2: bool) -> None:
    origin = {"Origin": "https://lite.koboldai.net"}
    with daemon.client(http2=http2) as client:
        asked = client.options(GENERATE, headers=origin | {"Access-Control-Request-Method": "POST"})
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (204, origin["Origin"])
        refused = client.get("/api/v1/model", headers=origin)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, origin["Origin"])
