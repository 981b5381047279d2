"""What has come of an answer so far. Pure."""

from ai_ticket.backend.relay import Relay
from ai_ticket.content import Function, ToolCall
from ai_ticket.errors import ApiResponseFormatError
from ai_ticket.event import LONGEST_TEXT, Usage
from ai_ticket.interfaces import Sink


class _Call:
    """A call of a tool, of which more may come."""

    def __init__(self) -> None:
        self.id = ""
        self.name = ""
        self.arguments: list[str] = []


class Generation:
    """An answer as it comes. What a sink gets is not kept.

    `sent`: the request is on its way. `begun`: some of the answer has come. `done`: all of it has.
    """

    def __init__(self, sink: Sink | None = None, relay: Relay | None = None) -> None:
        """@param relay: takes OpenAI's chunks on their way to the sink, where it wants those."""
        self.sink = sink
        self.relay = relay
        self._parts: list[str] = []
        self._reasoning: list[str] = []
        self._logprobs: list[bytes] = []
        self._calls: dict[int, _Call] = {}
        self._size = 0
        self.sent = False
        self.begun = False
        self.called = False
        self.finish_reason: str | None = None
        self.model: str | None = None
        self.usage: Usage | None = None
        self.done = False

    def was_sent(self) -> None:
        """The request is on its way."""
        self.sent = True

    def add(self, text: str) -> None:
        """Some text has come.

        @raise ApiResponseFormatError: more than any model writes, which would fill the memory.
        """
        self._count(len(text))
        if self.relay is None or not self.relay.framed:
            self._parts.append(text)

    def add_reasoning(self, text: str) -> None:
        """Some of what the model thinks before it answers has come. It is no text of the answer.

        @raise ApiResponseFormatError: as `add`.
        """
        self._count(len(text))
        if self.sink is None:
            self._reasoning.append(text)

    def add_call(self, index: int, id: str | None, name: str | None, arguments: str | None) -> None:
        """Some of a call of a tool has come.

        @raise ApiResponseFormatError: as `add`.
        """
        self.called = True
        self._count(1 + len(name or "") + len(arguments or ""))
        if self.sink is None:
            call = self._calls.setdefault(index, _Call())
            call.id = id or call.id
            call.name += name or ""
            call.arguments.append(arguments or "")

    def add_logprobs(self, tokens: bytes) -> None:
        """What the server says of some tokens has come: the JSON text of an array.

        @raise ApiResponseFormatError: as `add`.
        """
        self._count(len(tokens))
        inner = tokens.strip()[1:-1].strip()
        if self.sink is None and inner:
            self._logprobs.append(inner)

    def _count(self, size: int) -> None:
        self.begun = True
        self._size += size
        if self._size > LONGEST_TEXT and self.sink is None:
            raise ApiResponseFormatError("the answer is too large")

    def flush(self) -> None:
        """Hand on what has come since the last time: in one piece, however many tokens it was."""
        if self.sink is None or not self.begun:
            return
        text = ""
        if self._parts:
            text = self.text
            self._parts.clear()
        if self.relay is not None:
            self.relay.flush(text)
        elif text:
            self.sink.write(text)

    @property
    def text(self) -> str:
        """The text so far, but for what the sink has."""
        return "".join(self._parts)

    @property
    def reasoning(self) -> str | None:
        """What the model thought so far, if it did, but for what the sink has."""
        return "".join(self._reasoning) or None

    @property
    def tool_calls(self) -> list[ToolCall] | None:
        """The calls of tools so far, if there are any, but for what the sink has."""
        calls = sorted(self._calls.items())
        return [
            ToolCall(call.id or f"call_{index}", Function(call.name, "".join(call.arguments))) for index, call in calls
        ] or None

    @property
    def logprobs(self) -> str | None:
        """What the server said of the tokens so far: the JSON text of an array."""
        return (b"[" + b",".join(self._logprobs) + b"]").decode() if self._logprobs else None
