"""What comes in to `POST /events`: the elements of a JSON array, or lines of NDJSON as they arrive."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import cache
from typing import Any

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from ai_ticket import strictjson
from ai_ticket.errors import DomainError, InvalidInputFormat, InvalidRequest
from ai_ticket.strictjson import JSONError
from ai_ticket.web.faults import PayloadTooLarge

_BLANK = b" \t\r"


class Element(Struct, frozen=True):
    """The JSON text of one event of a batch, or what is wrong with it already.

    `marked`: lone surrogates in it have been replaced (see `strictjson.mark_lone_surrogates`).
    """

    text: bytes | DomainError
    marked: bool = False

    @property
    def size(self) -> int:
        """Bytes of the text."""
        return len(self.text) if isinstance(self.text, bytes) else 0


def array_elements(body: bytes, most: int) -> list[Element]:
    """The elements of a JSON array, each unread: how deep it nests is checked when it is read.

    @raise InvalidRequest: it is not JSON. @raise InvalidInputFormat: it is not an array.
    @raise PayloadTooLarge: it has more than `most` elements.
    """
    try:
        try:
            return _split(body, most, marked=False)
        except JSONError:
            marked = strictjson.mark_lone_surrogates(body)
            if marked == body:
                raise
            return _split(marked, most, marked=True)
    except JSONError as error:
        raise InvalidRequest(str(error), message="The body is not valid JSON.")


def _split(body: bytes, most: int, *, marked: bool) -> list[Element]:
    try:
        found = strictjson.decode(body, _array_type(most))
    except msgspec.ValidationError:
        if not body.lstrip(b" \t\r\n").startswith(b"["):
            strictjson.decode(body, Raw)
            raise InvalidInputFormat(message="The body must be a JSON array of events.")
        raise PayloadTooLarge(f"more than {most} events in the array")
    return [Element(bytes(text), marked) for text in msgspec.structs.astuple(found) if text is not UNSET]


@cache
def _array_type(most: int) -> Any:
    """An array of up to so many values. As a list, msgspec would build all of `[0,0,0,...]` before it counts."""
    fields = [(f"element_{number}", Raw | UnsetType, UNSET) for number in range(most)]
    return msgspec.defstruct("Array", fields, array_like=True, forbid_unknown_fields=True)


class LineSplitter:
    """Cuts what comes into lines, of which none is kept that is longer than `most` bytes.

    What is blank before a line, and blank lines, is left out. So much of it that it would make a line too long is one.
    """

    def __init__(self, most: int):
        self._most = most
        self._rest = bytearray()
        self._blank = 0
        self._too_long = False

    def feed(self, data: bytes) -> Iterator[Element]:
        """The lines that are complete with this."""
        first, *lines = data.split(b"\n")
        self._add(first)
        for line in lines:
            if self._rest or self._too_long or self._blank >= self._most:
                yield self._take()
            else:
                self._blank += 1
            if line:
                self._add(line)

    def end(self) -> Iterator[Element]:
        """The last line, which may lack its end."""
        if self._rest or self._too_long:
            yield self._take()

    def _add(self, part: bytes) -> None:
        if not self._rest and not self._too_long:
            size = len(part)
            part = part.lstrip(_BLANK)
            self._blank += size - len(part)
        self._rest += part
        if len(self._rest) > self._most:
            self._too_long = True
            self._rest.clear()

    def _take(self) -> Element:
        too_long, blank, line = self._too_long, not self._rest, bytes(self._rest.rstrip(_BLANK))
        self._rest.clear()
        self._blank = 0
        self._too_long = False
        if too_long or blank:
            return Element(PayloadTooLarge(f"the line is larger than {self._most} bytes"))
        return Element(line)


async def lines(
    read_some: Callable[[], Awaitable[bytes]], progress: Callable[[], None], most: int
) -> AsyncIterator[Element]:
    """The lines of a body as it comes. `progress` is called whenever one is complete."""
    splitter = LineSplitter(most)
    while data := await read_some():
        for element in splitter.feed(data):
            progress()
            yield element
    for element in splitter.end():
        yield element
