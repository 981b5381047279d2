"""OpenAI's chunks on their way from a model server to a caller. Pure.

They go on as the server framed them, with another id and model; what does not come from the server, as chunks that it
has not sent or in another form, is made up for.
"""

from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from ai_ticket.event import Chunks, Completion, Usage
from ai_ticket.interfaces import Sink

CHAT, TEXT = "chat.completion.chunk", "text_completion"
"""What chunks of either form call themselves."""


class _Frame(Struct):
    """What every chunk has around its choices."""

    id: Raw | UnsetType = UNSET
    object: Raw | UnsetType = UNSET
    created: Raw | UnsetType = UNSET
    model: Raw | UnsetType = UNSET


class Relay:
    """The chunks of one answer.

    Nothing is sent before some of the answer has come, for until then another attempt can be made. What comes from the
    end on is held until it is known why it ended: not every server says it right.
    """

    def __init__(self, wanted: Chunks, sink: Sink, *, chat: bool, framed: bool, model: Callable[[], str]):
        """@param chat: they are of a chat, not of a text. @param framed: the server frames them like that.

        @param model: the name for callers of what answers, known when the first chunk has come.
        """
        self.framed = framed
        self._wanted = wanted
        self._sink = sink
        self._chat = chat
        self._model = model
        self._ready: list[bytes] = []
        self._held: list[bytes] = []
        self._counts: tuple[bytes, Usage | None] | None = None
        self._swaps: list[tuple[bytes, bytes]] | None = None
        self._opened = False

    def take(self, chunk: bytes, *, last: bool) -> None:
        """A chunk has come from the server. From the `last` one on they are held."""
        chunk = self._renamed(chunk)
        if last or self._held:
            self._held.append(chunk)
        else:
            self._ready.append(chunk)

    def take_counts(self, chunk: bytes, usage: Usage | None) -> None:
        """The chunk with the tokens' counts has come from the server."""
        self._counts = self._renamed(chunk), usage

    def flush(self, text: str = "") -> None:
        """Hand on what has come; some of the answer is in it. `text` is what came in another form."""
        if text:
            self._ready.append(self._made(text, None))
        if self._ready:
            self._send(self._ready)
            self._ready = []

    def end(self, completion: Completion) -> None:
        """The answer is complete, and this is how it ended."""
        reason = completion.finish_reason
        held = self._held or [self._made("", reason)]
        held[0] = _ended(held[0], reason)
        if self._wanted.usage and completion.usage is not None:
            held.append(self._usage(completion.usage))
        self._send([*self._ready, *held])
        self._ready, self._held = [], []

    def _send(self, chunks: list[bytes]) -> None:
        self._sink.relay(b"data: %b\n\n" % b"\n\ndata: ".join(chunks))

    def _usage(self, usage: Usage) -> bytes:
        """The server's own chunk tells more, but for a server that counts wrong."""
        if self._counts is not None and self._counts[1] == usage:
            return self._counts[0]
        return self._encode([], usage=usage)

    def _made(self, text: str, reason: str | None) -> bytes:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        if not self._chat:
            choice["text"] = text
        else:
            opening = {} if self._opened else {"role": "assistant"}
            choice["delta"] = {**opening, "content": text} if text else opening
            self._opened = True
        return self._encode([choice])

    def _encode(self, choices: list[dict[str, Any]], **more: object) -> bytes:
        return msgspec.json.encode({**self._frame(), "choices": choices, **more})

    def _frame(self) -> dict[str, object]:
        return {
            "id": self._wanted.id,
            "object": CHAT if self._chat else TEXT,
            "created": self._wanted.created,
            "model": self._model(),
        }

    def _renamed(self, chunk: bytes) -> bytes:
        """The chunk with our id and model, on one line.

        A stream's chunks all have the same, so the bytes to put in their place are found out once. Within a text quotes
        are escaped: those bytes are not in any. But the call of a tool may have the same id, as an empty one.
        """
        chunk = chunk.replace(b"\n", b" ")  # an event may have several lines; within a text they are escaped too
        if self._swaps is None:
            self._swaps = self._find_swaps(chunk)
        if not self._swaps:
            return self._reframed(chunk)
        (id, our_id), (model, our_model) = self._swaps
        if chunk.count(id) != 1 or chunk.count(model) != 1:
            return self._reframed(chunk)
        return chunk.replace(id, our_id).replace(model, our_model)

    def _find_swaps(self, chunk: bytes) -> list[tuple[bytes, bytes]]:
        """What is to be put for what; nothing where that can't be told."""
        frame = msgspec.json.decode(chunk, type=_Frame)
        if frame.object is UNSET or frame.created is UNSET:
            return []
        swaps = []
        for name, raw, value in (("id", frame.id, self._wanted.id), ("model", frame.model, self._model())):
            given = b"" if isinstance(raw, UnsetType) else bytes(raw)
            for between in (b": ", b":"):
                begin = b'"%s"%s' % (name.encode(), between)
                if given and chunk.count(begin + given) == 1:
                    swaps.append((begin + given, begin + msgspec.json.encode(value)))
                    break
            else:
                return []
        return swaps

    def _reframed(self, chunk: bytes) -> bytes:
        """The same, for a chunk that lacks some of its frame or is written in an uncommon way."""
        fields = msgspec.json.decode(chunk, type=dict[str, Raw])
        frame = {name: Raw(msgspec.json.encode(value)) for name, value in self._frame().items()}
        return msgspec.json.encode({**frame, **fields, "id": frame["id"], "model": frame["model"]})


def _ended(chunk: bytes, reason: str) -> bytes:
    """The chunk that says why the answer ended, with the right reason."""
    fields = msgspec.json.decode(chunk)
    wrong = [choice for choice in fields["choices"] if choice.get("finish_reason") not in (None, reason)]
    if not wrong:
        return chunk
    for choice in wrong:
        choice["finish_reason"] = reason
    return msgspec.json.encode(fields)
