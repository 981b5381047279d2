"""The real daemon and the `openai` SDK, over TLS: what clients do who change no more than their base URL and key."""

import asyncio
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from daemon import PATIENCE, ROOT, TOKEN, Daemon, ModelServer, model_server, running, wait_until

pytestmark = pytest.mark.e2e
HELLO: list[Any] = [{"role": "user", "content": "Say this, please."}]
WEATHER: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


class FakeKobold:
    """`ai-ticket fake-backend` in a process of its own."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-c", "from ai_ticket.cli import main; main()", "fake-backend", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().decode().strip()

    def perf(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/api/extra/perf", timeout=PATIENCE) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeKobold]:
    found = FakeKobold("--tokens-per-second", "100", "--first-token-seconds", "0.05", "--context", "2048")
    yield found
    found.close()


@pytest.fixture(scope="module")
def daemon(fake: FakeKobold, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("openai"), KOBOLDCPP_API_URL=fake.url) as found:
        yield found.ready()


@pytest.fixture
def tooled(tmp_path: Path) -> Iterator[tuple[Daemon, ModelServer]]:
    """With a model server that knows tools, and a quota of one call a second."""
    with (
        model_server() as server,
        running(
            tmp_path, KOBOLDCPP_API_URL=server.url, RATE_LIMIT_REQUESTS="1", RATE_LIMIT_WINDOW_SECONDS="1"
        ) as daemon,
    ):
        yield daemon.ready(), server


def options(daemon: Daemon, key: str = TOKEN, **more: Any) -> dict[str, Any]:
    return {"base_url": f"https://127.0.0.1:{daemon.port('https')}/v1", "api_key": key, "timeout": PATIENCE, **more}


@pytest.fixture
def client(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[openai.OpenAI]:
    monkeypatch.setenv("SSL_CERT_FILE", str(daemon.certificates.ca))
    with openai.OpenAI(**options(daemon)) as found:
        yield found


def test_a_chat_whole_and_in_pieces(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert client.models.retrieve(model.id) == model
    answer = client.chat.completions.create(model=model.id, messages=HELLO, max_tokens=20, temperature=0.5, seed=1)
    assert answer.model == model.id
    assert answer.usage is not None
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 20)
    stream = client.chat.completions.create(
        model=model.id, messages=HELLO, max_completion_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert {(chunk.model, chunk.object) for chunk in chunks} == {(model.id, "chat.completion.chunk")}
    assert len({chunk.id for chunk in chunks}) == 1
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content
    assert chunks[-1].usage == answer.usage


def test_a_text(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="gpt-3.5-turbo-instruct", prompt="Once", max_tokens=8, stop=["\n"])
    stream = client.completions.create(model="gpt-3.5-turbo-instruct", prompt="Once", max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text != ""


def test_errors(client: openai.OpenAI, daemon: Daemon) -> None:
    """Each is the class of the SDK's that says what is wrong, and is not tried again where that is no use."""
    with pytest.raises(openai.AuthenticationError) as wrong_key:
        openai.OpenAI(**options(daemon, "wrong")).models.list()
    assert wrong_key.value.code == "invalid_api_key"
    assert wrong_key.value.request_id is not None
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.BadRequestError) as several:
        client.chat.completions.create(model="m", messages=HELLO, n=2)
    assert (several.value.param, several.value.code) == ("n", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "word " * 3000}])
    assert long.value.code == "context_length_exceeded"


def test_who_stops_reading_stops_the_generation(client: openai.OpenAI, fake: FakeKobold) -> None:
    with client.chat.completions.create(
        model="m", messages=HELLO, max_tokens=1500, stream=True, extra_body={"repeat_penalty": 1.1}
    ) as stream:
        next(iter(stream))
        assert fake.perf()["idle"] == 0
    wait_until(lambda: fake.perf()["idle"] == 1, "the end of the generation")
    assert fake.perf()["last_token_count"] < 1000


def test_async(daemon: Daemon, fake: FakeKobold, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time; a stream that is given up leaves its slot to the other."""
    monkeypatch.setenv("SSL_CERT_FILE", str(daemon.certificates.ca))

    async def ask() -> tuple[str | None, int]:
        async with openai.AsyncOpenAI(**options(daemon)) as client:

            async def pieces() -> int:
                count = 0
                stream = await client.chat.completions.create(model="m", messages=HELLO, max_tokens=10, stream=True)
                async for _ in stream:
                    count += 1
                return count

            endless = client.chat.completions.create(model="m", messages=HELLO, max_tokens=2000)
            given_up = asyncio.create_task(endless)
            await asyncio.to_thread(wait_until, lambda: fake.perf()["idle"] == 0, "the generation's begin")
            given_up.cancel()
            whole = client.chat.completions.create(model="m", messages=HELLO, max_tokens=10)
            answer, count = await asyncio.wait_for(asyncio.gather(whole, pieces()), PATIENCE)
            return answer.choices[0].message.content, count

    text, count = asyncio.run(ask())
    assert text
    assert count > 1


def test_tools_there_and_back_with_the_sdk_s_own_retries(
    tooled: tuple[Daemon, ModelServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call of a tool, whole and in pieces, and its result; one call a second is let in, and the SDK waits for it."""
    daemon, server = tooled
    monkeypatch.setenv("SSL_CERT_FILE", str(daemon.certificates.ca))
    with openai.OpenAI(**options(daemon)) as client:
        asked = client.chat.completions.create(model="m", messages=HELLO, tools=WEATHER, tool_choice="required")
        message = asked.choices[0].message
        assert asked.choices[0].finish_reason == "tool_calls"
        assert message.tool_calls is not None
        [call] = message.tool_calls
        assert call.type == "function"
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})
        with client.chat.completions.stream(model="m", messages=HELLO, tools=WEATHER) as stream:
            for _ in stream:
                pass
            found = stream.get_final_completion().choices[0].message.tool_calls
        assert found is not None
        assert [one.function.arguments for one in found] == [call.function.arguments]
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        answer = client.chat.completions.create(model="m", messages=[*HELLO, message, result], tools=WEATHER)  # type: ignore[list-item]
        assert answer.choices[0].message.content == "Say this, please."
    assert [message["role"] for message in server.requests[-1]["messages"]] == ["user", "assistant", "tool"]
    assert daemon.logged("/v1/chat/completions 429")
