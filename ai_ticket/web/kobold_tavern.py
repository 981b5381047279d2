"""SillyTavern's streams: OpenAI's chunks, made here of the text.

Chunks of a model server's own would go past the text that is kept of a generation with a key.
"""

import msgspec
from msgspec import Struct

from ai_ticket.errors import DomainError
from ai_ticket.event import Chunks, Completion, FinishReason
from ai_ticket.web.openai_faults import openai_error_event


class _Choice(Struct, gc=False):
    index: int
    text: str
    logprobs: None
    finish_reason: FinishReason | None


class _Chunk(Struct, gc=False):
    id: str
    object: str
    created: int
    model: str
    choices: list[_Choice]


class TavernFraming:
    """The pieces of an answer."""

    def __init__(self, wanted: Chunks, model: str):
        """@param wanted: what they have in common. @param model: the name for the caller of what answers."""
        self._wanted = wanted
        self._model = model

    def text(self, text: str) -> bytes:
        """Some text."""
        return self._chunk(text, None)

    def end(self, completion: Completion) -> bytes:
        """The end of an answer that is complete, or was stopped."""
        return self._chunk("", completion.finish_reason) + b"data: [DONE]\n\n"

    def error(self, error: DomainError) -> bytes:
        """The end of one that failed: without a `[DONE]`."""
        return openai_error_event(error)

    def _chunk(self, text: str, reason: FinishReason | None) -> bytes:
        choice = _Choice(0, text, None, reason)
        chunk = _Chunk(self._wanted.id, "text_completion", self._wanted.created, self._model, [choice])
        return b"data: " + msgspec.json.encode(chunk) + b"\n\n"
