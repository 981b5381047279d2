"""What a model server does, in two parts.

The fake against the recorded exchanges of a real KoboldCPP: to the same request the same bytes. What differs by nature
is evened out: times, ids, numbers of tokens, and how the text of a stream is cut into events. The text is given to the
fake; what it makes of it (usage, reasons, events, heads) is its own.

The fake and a real llama.cpp server side by side, over TCP, where they are to behave alike.
"""

import json
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import pytest_twisted
from fake_world import FakeWorld, body_of, text_of
from harness import CAPTURES, Attempts
from memory_network import Caller
from pytest_twisted import ensureDeferred
from twisted.internet import reactor as _reactor
from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.internet.task import deferLater

from ai_ticket.backend import model as bundled
from ai_ticket.backend.address import Location
from ai_ticket.backend.body import Body
from ai_ticket.backend.fake import RATE_LIMITED, FakeKobold, Script, Settings
from ai_ticket.backend.fake.text import pieces
from ai_ticket.backend.http1 import HttpClient, request_head
from ai_ticket.backend.http1_connection import Response
from ai_ticket.backend.http_client import make_http_client
from ai_ticket.backend.kobold import BackendTimeouts, KoboldBackend
from ai_ticket.backend.local import LocalServer
from ai_ticket.backend.server import ModelServer
from ai_ticket.backend.sse import SSEDecoder
from ai_ticket.event import Event, Message, Parameters
from ai_ticket.urls import request_url

reactor: Any = _reactor
MODEL = "koboldcpp/SmolLM2-135M-Instruct.Q4_1"
NOT_IMITATED = {
    "get-.well-known_serviceinfo": "an index of other interfaces",
    "get-api_tags": "Ollama's interface",
    "messages-anthropic": "Anthropic's interface",
    "responses": "OpenAI's other interface",
    "generate-genkey-logprobs": "log probabilities",
    "jinja-badmsg": "--jinja",
    "jinja-chat": "--jinja",
    "jinja-tokencount": "--jinja",
    "chat-eos": "--jinja",
    "jsonmode": "--jinja, and grammars",
    "tools-chat": "--jinja, and tools",
    "maxlength-over-ctx": "the caller gave up before there was an answer",
    "reload-unload": "administration",
    "admin-list-key": "administration",
    "admin-reload-nokey": "administration",
    "generate-adminkey": "administration",
}
NAMES = sorted(
    str(path.relative_to(CAPTURES).with_suffix(""))
    for folder in CAPTURES.glob("koboldcpp*")
    for path in folder.glob("*.txt")
    if path.stem not in NOT_IMITATED
)


class Exchange:
    """A recorded exchange: the request, and the answer's bytes, of which there may be none."""

    def __init__(self, name: str):
        request, _, response = (CAPTURES / f"{name}.txt").read_bytes().partition(b"### RESPONSE\n")
        lines = request.decode().splitlines()[1:]
        self.method, _, url = lines[0].partition(" ")
        self.path = "/" + url.split("/", 3)[3]
        arguments = [line.removeprefix("# curl args: ") for line in lines if line.startswith("# curl args: ")]
        headers = re.findall(r"-H ([\w-]+): (.*?)(?= -H |$)", " ".join(arguments))
        self.headers = dict(headers)
        body = "\n".join(line for line in lines[1:] if line and not line.startswith("#"))
        self.body = body.encode() if body else None
        self.stays_open = response.startswith(b"curl: (28)")
        if response.startswith(b"curl:"):
            response = response.partition(b"\n")[2]
        self.response = response.removesuffix(b"\n").lstrip(b"\n")

    @property
    def fields(self) -> dict[str, Any]:
        try:
            found = json.loads(self.body or b"{}")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def script(self) -> Script:
        """What makes the fake's model say what the recorded one said, in as many tokens."""
        text, reason, tokens = _said(self.response)
        stops = self.fields.get("stop") or self.fields.get("stop_sequence")
        if isinstance(stops, list) and isinstance(stops[0], str):
            return Script(text=text + stops[0])  # it came to the same number of tokens
        wanted = tokens or self.fields.get("max_tokens") or self.fields.get("max_length") or 0
        return Script(pieces=_fitted(text, wanted - (reason == "stop") if isinstance(wanted, int) else 0))


def _said(response: bytes) -> tuple[str, str | None, int]:
    """Text, finish reason and number of tokens of a recorded answer; 0 where it does not say."""
    body = response.partition(b"\r\n\r\n")[2].decode()
    if body.startswith(("data:", "event:")):
        values = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    else:
        values = [json.loads(body)] if body.startswith("{") else []
    text, reason, tokens = "", None, 0
    for value in values:
        for choice in value.get("choices") or value.get("results") or [value]:
            message = choice.get("message") or choice.get("delta") or choice
            text += message.get("content") or message.get("text") or message.get("token") or ""
            reason = choice.get("finish_reason") or reason
            tokens = choice.get("completion_tokens", tokens)
        tokens = value.get("usage", {}).get("completion_tokens", tokens)
    return text, reason, tokens


def _fitted(text: str, count: int) -> list[str]:
    """The text in so many tokens."""
    found = pieces(text)
    if len(found) > count > 0:
        return [*found[: count - 1], "".join(found[count - 1 :])]
    return found + [""] * (count - len(found))


def _evened(response: bytes) -> str:
    """An answer without what differs from one time to the next."""
    head, separator, body = response.decode().partition("\r\n\r\n")
    length = re.search(r"ontent-[lL]ength: (\d+)", head)
    assert length is None or int(length[1]) == len(body.encode())
    head = re.sub(r"ontent-([lL])ength: \d+", r"ontent-\1ength: N", head)
    head = re.sub(r"Date: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", "Date: D", head)
    body = re.sub(r'"(chatcmpl|cmpl)-A\d{6}"', r'"\1-A"', body)
    body = re.sub(r'"created": \d{10}\b', '"created": T', body)
    body = re.sub(r'"ids": \[([\d, ]*)\]', lambda found: f'"ids": {len(found[1].split())}', body)
    if '"total_gens"' in body:
        body = re.sub(r'("(?!queue|idle")\w+": )(-?\d+(\.\d+)?|true|false)', _type_of, body)
    body = re.sub(r'"admin": \d', '"admin": A', body)
    return head + separator + _joined(body)


def _type_of(found: re.Match[str]) -> str:
    kind = "bool" if found[2] in ("true", "false") else "float" if found[3] else "int"
    return found[1] + kind


_TEXT = re.compile(r'("finish_reason": null.*"(?:content|text)": |"token": )"((?:[^"\\]|\\.)*)"')


def _joined(body: str) -> str:
    """A stream's body with the texts of neighbouring events joined; another body as it is."""
    if not body.startswith(("data: ", "event: ")):
        return body
    blocks: list[tuple[str, str]] = []
    for block in body.split("\n\n"):
        found = _TEXT.search(block)
        frame, text = (_TEXT.sub(r"\1TEXT", block), found[2]) if found else (block, "")
        if blocks and found and text and blocks[-1][0] == frame:
            text = blocks.pop()[1] + text
        blocks.append((frame, text))
    return "\n\n".join(f"{frame}|{text}" for frame, text in blocks)


def _with_last_key(world: FakeWorld, exchange: Exchange) -> None:
    """What was asked for just before: a stream with a key."""
    before = Exchange("koboldcpp/generate-stream")
    world.fake.script(before.script())
    world.send(before.method, before.path, before.body)
    world.run(2.0)


def _busy(world: FakeWorld, exchange: Exchange) -> None:
    """Recorded with `--multiuser 0` while an answer was generated."""
    world.fake.settings.multiuser = 0
    world.fake.script(Script(tokens=1000))
    world.post("/api/v1/generate", {"prompt": "x"}, authorization="Bearer sesame")
    world.run(0.1)


def _no_model(world: FakeWorld, exchange: Exchange) -> None:
    world.fake.settings.model = None


def _rate_limited(world: FakeWorld, exchange: Exchange) -> None:
    world.fake.script(RATE_LIMITED)


def _has_generated(world: FakeWorld, exchange: Exchange) -> None:
    world.fake.settings.first_token_seconds = 0.2
    world.post("/api/v1/generate", {"prompt": "x"}, authorization="Bearer sesame")
    world.run(2.0)


def _has_seen_these_tokens(world: FakeWorld, exchange: Exchange) -> None:
    """Our numbers of tokens are others, so those of the same text are sent."""
    counted = json.loads(body_of(world.post("/api/extra/tokencount", {"prompt": "hello world"})))
    exchange.body = json.dumps({"ids": counted["ids"][1:]}).encode()


def _is_as_long_as_it_was(world: FakeWorld, exchange: Exchange) -> None:
    """The recording has only the beginning of this prompt, of 4,000 words."""
    words = "word " * 4000
    prompt = {"messages": [{"role": "user", "content": words}]} if "chat" in exchange.path else {"prompt": words}
    exchange.body = json.dumps({**prompt, "max_tokens": 4}).encode()


SETUPS: list[tuple[str, Callable[[FakeWorld, Exchange], None]]] = [
    ("/(check-post|check-get|abort-idle)", _with_last_key),
    ("/busy-(503-|abort|noauth|perf|tokencount)", _busy),  # busy-503 and busy-badjson came when it was free again
    ("/nomodel-", _no_model),
    ("/ratelimit-2", _rate_limited),
    ("/perf-(after|nokey)", _has_generated),
    ("/busy-noauth", _has_generated),
    ("/detokenize", _has_seen_these_tokens),
    ("/overctx", _is_as_long_as_it_was),
]


def replay(name: str) -> tuple[Exchange, FakeWorld, Caller]:
    """Send the recorded request to a fake that is as the recorded server was."""
    exchange = Exchange(name)
    world = FakeWorld(model=MODEL, password="sesame" if "koboldcpp-password" in name else None)
    for pattern, set_up in reversed(SETUPS):
        if re.search(pattern, name):
            set_up(world, exchange)
    world.fake.script(exchange.script())
    caller = world.send(exchange.method, exchange.path, exchange.body, **exchange.headers)
    return exchange, world, caller


@pytest.mark.parametrize("name", [name for name in NAMES if "midstream" not in name])
def test_the_fake_answers_as_recorded(name: str) -> None:
    exchange, world, caller = replay(name)
    world.run(20.0)
    assert _evened(caller.received) == _evened(exchange.response)
    assert caller.ended == (None if exchange.stays_open else "closed")


def test_a_stream_that_is_aborted_ends_as_recorded() -> None:
    exchange, world, caller = replay("koboldcpp/abort-midstream-chat")
    text, _, _ = _said(exchange.response)

    def said() -> Any:
        return json.loads(body_of(world.post("/api/extra/generate/check", {"genkey": "S1"})))["results"][0]["text"]

    while said() != text:
        world.run(0.01)
    assert world.abort("S1") == ("true", "true")
    world.run(1.0)
    assert _evened(caller.received) == _evened(exchange.response)


def test_a_server_that_is_killed_ends_a_stream_as_recorded() -> None:
    exchange, world, caller = replay("koboldcpp/killed-midstream")
    text, _, _ = _said(exchange.response)
    while text_of(caller) != text:
        world.run(0.01)
    world.fake.kill()
    world.run()
    assert _evened(caller.received) == _evened(exchange.response)
    assert caller.ended == "closed"


def test_every_recording_is_compared_or_left_out_for_a_reason() -> None:
    assert len(NAMES) > 100
    recorded = {path.stem for path in CAPTURES.glob("koboldcpp*/*.txt")}
    assert set(NOT_IMITATED) <= recorded


# The fake and llama.cpp side by side.


async def _until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What the condition gives once it is true."""
    end = reactor.seconds() + seconds
    while not (found := condition()):
        assert reactor.seconds() < end, "it took too long"
        await deferLater(reactor, 0.01)
    return found


@pytest_twisted.async_yield_fixture(scope="module", params=["fake", pytest.param("llama.cpp", marks=pytest.mark.e2e)])
async def server(request: pytest.FixtureRequest) -> AsyncIterator[Location]:
    """A server with one slot."""
    if request.param == "fake":
        fake = FakeKobold(reactor, Settings(password="sesame", tokens_per_second=70.0, context_length=16_384))
        port = reactor.listenTCP(0, fake, interface="127.0.0.1")
        yield Location(f"http://127.0.0.1:{port.getHost().port}", "sesame")
        fake.kill()
        await port.stopListening()
        return
    problem = bundled.problem(None)
    if problem is not None:
        pytest.skip(problem)
    local = LocalServer(
        processes=reactor,
        clock=reactor,
        model=bundled.bundled_model_path(),
        slots=1,
        make_key=lambda: "sesame",
        jitter=lambda: 0.0,
        environ=os.environ,
    )
    local.startService()
    yield await _until(local.location, 60.0)
    await local.stopService()


class Live:
    """A caller of a server that really listens."""

    def __init__(self, location: Location, http: HttpClient) -> None:
        self.http = http
        self.location = location

    async def post(self, path: str, fields: dict[str, Any], key: str = "sesame") -> Response:
        url = request_url(self.location.url + path)
        body = json.dumps(fields).encode()
        head = request_head("POST", url, {"Authorization": f"Bearer {key}", "Content-Length": str(len(body))})
        return await self.http(url).request(head + b"\r\n" + body, keep=False, sent=lambda: None)

    async def ask(self, path: str, fields: dict[str, Any], key: str = "sesame") -> tuple[int, Any]:
        response = await self.post(path, fields, key)
        body = b"".join(await self.read(response))
        return response.status, json.loads(body) if body else None

    def read(self, response: Response) -> Deferred[list[bytes]]:
        """All of a body; cancelling it closes the connection."""
        chunks: list[bytes] = []
        reading: Deferred[Any] = Body(reactor, chunks.append, first=SOON, idle=SOON).read(response)
        return reading.addCallback(lambda _: chunks)

    async def events(self, path: str, fields: dict[str, Any]) -> list[Any]:
        response = await self.post(path, {**fields, "stream": True})
        assert response.media_type == "text/event-stream"
        decoder = SSEDecoder()
        found = [event for chunk in await self.read(response) for event in decoder.feed(chunk)]
        assert found.pop() == b"[DONE]"
        return [json.loads(event) for event in found]

    def backend(self) -> KoboldBackend:
        return KoboldBackend(
            "host",
            ModelServer(self.http, reactor, lambda: self.location),
            clock=reactor,
            timeouts=BackendTimeouts(None, SOON),
            slots=None,
            new_key=lambda: f"key{reactor.seconds()}",
            recorder=Attempts(),
        )


def _sockets() -> set[Any]:
    return {*reactor.getReaders(), *reactor.getWriters()}


@pytest.fixture
def live(server: Location) -> Iterator[Live]:
    sockets = _sockets()
    yield Live(server, make_http_client(reactor, ca_file=None, connect_timeout=5.0))
    closed = _until(lambda: _sockets() <= sockets and not reactor.getDelayedCalls())
    pytest_twisted.blockon(Deferred.fromCoroutine(closed))


SOON = 60.0
"""Longer than a busy machine needs for a few tokens, and shorter than for the thousands that the others ask for."""
MESSAGES = [{"role": "user", "content": "Tell me a long story about the sea."}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ENDLESS = {"bypass_eos": True, "ignore_eos": True}
PROMPTS: list[tuple[str, dict[str, Any]]] = [(CHAT, {"messages": MESSAGES}), (TEXT, {"prompt": "Once upon a time"})]


@pytest.mark.parametrize(("path", "prompt"), PROMPTS)
@ensureDeferred
async def test_a_stream_has_text_then_a_reason_and_usage(live: Live, path: str, prompt: dict[str, Any]) -> None:
    fields = {**prompt, **ENDLESS, "max_tokens": 12, "stream_options": {"include_usage": True}}
    events = await live.events(path, fields)
    usage = events[-1]["usage"]
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12
    choices = [choice for event in events for choice in event["choices"]]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    texts = [choice["delta"].get("content") if path == CHAT else choice["text"] for choice in choices]
    assert "".join(text for text in texts if text)
    assert not texts[-1]
    assert len({event["id"] for event in events}) == 1


@ensureDeferred
async def test_usage_is_streamed_only_to_who_asks(live: Live) -> None:
    """Of a chat: llama.cpp adds it to the last event of a completion whether asked or not."""
    events = await live.events(CHAT, {"messages": MESSAGES, "max_tokens": 2})
    assert all(event["choices"] and not event.get("usage") for event in events)


@pytest.mark.parametrize(("path", "prompt"), PROMPTS)
@ensureDeferred
async def test_an_answer_in_one_piece(live: Live, path: str, prompt: dict[str, Any]) -> None:
    status, answer = await live.ask(path, {**prompt, **ENDLESS, "max_tokens": 5})
    [choice] = answer["choices"]
    assert (status, choice["finish_reason"], answer["usage"]["completion_tokens"]) == (200, "length", 5)
    assert choice["message"]["content"] if path == CHAT else choice["text"]
    assert answer["object"] == ("chat.completion" if path == CHAT else "text_completion")


@ensureDeferred
async def test_a_stop_sequence_is_not_shown(live: Live) -> None:
    """KoboldCPP says "length" and llama.cpp "stop"; both have then generated less than they might have."""
    status, answer = await live.ask(CHAT, {"messages": MESSAGES, "max_tokens": 50, "stop": [" "]})
    assert status == 200
    assert " " not in answer["choices"][0]["message"]["content"]
    assert 0 < answer["usage"]["completion_tokens"] < 50


@ensureDeferred
async def test_a_wrong_key_and_a_wrong_path(live: Live) -> None:
    status, answer = await live.ask(CHAT, {"messages": MESSAGES}, "another")
    assert (status, (answer.get("detail") or answer["error"])["type"]) in [
        (401, "unauthorized"),
        (401, "authentication_error"),
    ]
    response = await live.post("/nope", {})
    await live.read(response)
    assert response.status == 404


@ensureDeferred
async def test_closing_a_stream_frees_the_slot(live: Live) -> None:
    """Or the next would wait for all of it."""
    response = await live.post(CHAT, {"messages": MESSAGES, **ENDLESS, "max_tokens": 8000, "stream": True})
    came: Deferred[None] = Deferred()
    reading = Body(reactor, lambda _: came.called or came.callback(None), first=SOON, idle=SOON).read(response)
    await came
    reading.addErrback(lambda failure: failure.trap(CancelledError))
    reading.cancel()
    status, _ = await live.ask(CHAT, {"messages": MESSAGES, "max_tokens": 1})
    assert status == 200


@ensureDeferred
async def test_who_finds_the_slot_taken_waits(live: Live) -> None:
    asking = [Deferred.fromCoroutine(live.ask(TEXT, {"prompt": f"{n}", "max_tokens": 3, **ENDLESS})) for n in range(3)]
    answers = await gatherResults(asking)
    assert [status for status, _ in answers] == [200] * 3
    assert [answer["usage"]["completion_tokens"] for _, answer in answers] == [3] * 3


@pytest.mark.parametrize(("limit", "stop", "reason"), [(3, [], "length"), (100, [" "], "stop")])
@ensureDeferred
async def test_our_client_gets_a_completion(live: Live, limit: int, stop: list[str], reason: str) -> None:
    backend = live.backend()
    state = await backend.probe()
    assert (state.up, state.slots, state.error) == (True, 1, None)
    event = Event([Message("user", "Tell me a story.")], Parameters(max_tokens=limit, stop=stop))
    completion = await backend.complete(event, reactor.seconds() + SOON)
    assert completion.finish_reason == reason
    assert completion.usage is not None
    assert 0 < completion.usage.completion_tokens <= limit
    assert completion.model == state.model


@ensureDeferred
async def test_our_client_frees_the_slot_when_it_is_cancelled(live: Live) -> None:
    backend = live.backend()
    event = Event([Message("user", "Tell me a story.")], Parameters(max_tokens=8000))
    answering = Deferred.fromCoroutine(backend.complete(event, reactor.seconds() + SOON))
    answering.addErrback(lambda failure: failure.trap(CancelledError))
    await deferLater(reactor, 0.5)
    answering.cancel()
    short = Event([Message("user", "Hi")], Parameters(max_tokens=1))
    assert (await backend.complete(short, reactor.seconds() + SOON)).text
