"""A fake KoboldCPP on a clock, with callers in memory."""

import json
from typing import Any

from memory_network import Caller, Network
from twisted.internet.task import Clock

from ai_ticket.backend.fake import FakeKobold, Settings

NOW = 1_795_289_340.0
"""About when the exchanges were recorded, so that times have as many digits."""
STEP = 0.01


class FakeWorld:
    """The fake, its clock and its network."""

    def __init__(self, **settings: Any) -> None:
        self.clock = Clock()
        self.clock.advance(NOW)
        self.fake = FakeKobold(self.clock, Settings(**settings))
        self.network = Network(self.clock, self.fake)

    def run(self, seconds: float = 0.0) -> None:
        """Let time pass, in small steps."""
        end = self.clock.seconds() + seconds
        while self.clock.seconds() < end - STEP / 2:
            self.clock.advance(STEP)
        for _ in range(12):
            self.clock.advance(0)

    def connect(self) -> Caller:
        caller: Caller = self.network.link(Caller())
        return caller

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> Caller:
        """Send a request, and let it arrive."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "Host: x", *(f"{name}: {value}" for name, value in headers.items())]
        if body is not None:
            lines.append(f"Content-Length: {len(data)}")
        caller = self.connect()
        caller.transport.write("\r\n".join([*lines, "", ""]).encode() + data)  # type: ignore[union-attr]
        self.run()
        return caller

    def post(self, path: str, body: Any = None, **headers: str) -> Caller:
        return self.send("POST", path, body if body is not None else {}, **headers)

    def get(self, path: str) -> Any:
        """The JSON value that a path gives."""
        caller = self.send("GET", path)
        assert caller.ended == "closed"
        return json.loads(body_of(caller))

    def abort(self, key: str | None = None) -> tuple[str, str]:
        caller = self.post("/api/extra/abort", {} if key is None else {"genkey": key})
        self.run(0.1)
        answer = json.loads(body_of(caller))
        return answer["success"], answer["done"]


def status_of(caller: Caller) -> int:
    return int(caller.received.split(b" ", 2)[1]) if caller.received else 0


def body_of(caller: Caller) -> bytes:
    return caller.received.partition(b"\r\n\r\n")[2]


def result_of(caller: Caller) -> dict[str, Any]:
    """What KoboldCPP's own endpoint answered."""
    assert caller.ended == "closed"
    [result] = json.loads(body_of(caller))["results"]
    found: dict[str, Any] = result
    return found


def events_of(caller: Caller) -> list[Any]:
    """The values of a stream's events so far."""
    blocks = body_of(caller).decode().split("\n\n")
    assert blocks.pop() == ""
    data = [block.rpartition("data: ")[2] for block in blocks]
    return [json.loads(value) if value != "[DONE]" else value for value in data]


def text_of(caller: Caller) -> str:
    """The text that a stream of chat or of KoboldCPP's own has brought so far."""
    text = ""
    for event in events_of(caller):
        if event != "[DONE]":
            choices = event.get("choices", [])
            text += event["token"] if "token" in event else choices[0]["delta"]["content"] if choices else ""
    return text
