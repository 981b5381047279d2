"""What goes out from `POST /events`: a JSON array in the order of the events, or a line for each as it ends."""

from collections.abc import Iterator
from typing import Protocol


class BatchOutput(Protocol):
    """Puts results, each a JSON text, into the form that the caller asked for."""

    content_type: bytes

    @property
    def held(self) -> int:
        """Bytes of results that wait for others before them."""

    def add(self, index: int, result: bytes) -> Iterator[bytes]:
        """What can be sent with this result."""

    def end(self) -> bytes:
        """What comes after the last."""


class LinesOutput:
    """NDJSON, in the order in which the events end."""

    content_type = b"application/x-ndjson"
    held = 0

    def add(self, index: int, result: bytes) -> Iterator[bytes]:
        """Its line."""
        yield result + b"\n"

    def end(self) -> bytes:
        """Nothing."""
        return b""


class ArrayOutput:
    """A JSON array, in the order of the events."""

    content_type = b"application/json"

    def __init__(self) -> None:
        self.held = 0
        self._waiting: dict[int, bytes] = {}
        self._next = 0

    def add(self, index: int, result: bytes) -> Iterator[bytes]:
        """This result and those that have waited for it, if its turn has come."""
        self._waiting[index] = result
        self.held += len(result)
        while (result := self._waiting.pop(self._next, b"")) != b"":
            self.held -= len(result)
            yield (b",\n" if self._next else b"[") + result
            self._next += 1

    def end(self) -> bytes:
        """The closing bracket."""
        return b"]\n" if self._next else b"[]\n"
