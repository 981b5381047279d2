"""The log on a clock, with a reader in memory that may stop reading."""

import json
from collections.abc import Callable
from typing import Any

from twisted.internet.task import Clock
from twisted.logger import Logger

from ai_ticket.telemetry.logs import Logs


class Reader:
    """A stream that takes `room` bytes, all by default, and may be broken."""

    def __init__(self) -> None:
        self.data = b""
        self.room: int | None = None
        self.error: OSError | None = None
        self.waits: list[float] = []
        self.when_waited_for: Callable[[], None] = lambda: None

    def write(self, data: bytes) -> int:
        if self.error is not None:
            raise self.error
        taken = len(data) if self.room is None else min(len(data), self.room)
        if not taken:
            raise BlockingIOError
        self.data += data[:taken]
        if self.room is not None:
            self.room -= taken
        return taken

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.when_waited_for()
        return self.room is None or self.room > 0

    @property
    def text(self) -> str:
        return self.data.decode()

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.split("\n")[:-1]]

    @property
    def messages(self) -> list[str]:
        return [line["message"] for line in self.lines]


class FakeReactor(Clock):
    """A clock with those other parts of a reactor that the log needs."""

    def __init__(self) -> None:
        super().__init__()
        self.from_threads: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self.at_shutdown: list[Callable[[], None]] = []

    def callFromThread(self, call: Callable[..., None], *arguments: Any) -> None:
        self.from_threads.append((call, arguments))

    def addSystemEventTrigger(self, phase: str, event: str, call: Callable[[], None]) -> None:
        assert (phase, event) == ("after", "shutdown")
        self.at_shutdown.append(call)


class MemoryLog:
    """A log, its reactor and its reader."""

    def __init__(self, level: str = "INFO", form: Any = "json", payloads: int = 0, worker: int | None = None) -> None:
        self.reactor = FakeReactor()
        self.reader = Reader()
        self.logs = Logs(level, form, payloads, reactor=self.reactor, out=self.reader, worker=worker)
        self.log = Logger("a.logger", observer=self.logs)

    def stop(self) -> None:
        """As the reactor does at its end."""
        for call in self.reactor.at_shutdown:
            call()
        assert self.reactor.getDelayedCalls() == []
