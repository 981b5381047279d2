"""OpenAI's surface: `/v1/chat/completions`, `/v1/completions` and `/v1/models`, for the clients that people have."""

from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import msgspec
from msgspec.structs import replace
from twisted.internet.interfaces import IReactorTime

from ai_ticket.errors import DomainError
from ai_ticket.event import Chunks, Completion, Event, EventLimits
from ai_ticket.interfaces import BackendState
from ai_ticket.web.intake import Intake
from ai_ticket.web.kobold_requests import is_tavern, read_tavern
from ai_ticket.web.kobold_tavern import TavernFraming
from ai_ticket.web.openai_faults import ModelNotFound, openai_error_event
from ai_ticket.web.openai_requests import read_chat, read_text
from ai_ticket.web.request import Request, Response
from ai_ticket.web.site import Route, json_response
from ai_ticket.web.streaming import Framing, Streamed

CHAT, TEXT, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
OWNER = "ai-ticket"


class _Framing:
    """Chunks come ready to be sent; what is left to say is that there are no more."""

    def text(self, text: str) -> bytes:
        """There is no text beside the chunks."""
        raise AssertionError("chunks were asked for")

    def end(self, completion: Completion) -> bytes:
        """The end of an answer that is complete."""
        return b"data: [DONE]\n\n"

    def error(self, error: DomainError) -> bytes:
        """The end of one that failed: without a `[DONE]`."""
        return openai_error_event(error)


class _Form:
    """What chats and texts have in common."""

    def __init__(self, limits: EventLimits, clock: IReactorTime):
        self._limits = limits
        self._clock = clock

    def framing(self, event: Event, request: Request) -> Framing:
        """How the pieces of an answer look."""
        return _Framing()

    def _answer(self, kind: str, choice: dict[str, Any], completion: Completion, event: Event) -> Response:
        wanted = event.chunks or Chunks("", 0)
        answer: dict[str, Any] = {
            "id": wanted.id,
            "object": kind,
            "created": wanted.created,
            "model": completion.model,
            "choices": [{"index": 0, **choice, "finish_reason": completion.finish_reason}],
        }
        if completion.usage is not None:
            answer["usage"] = completion.usage
        return json_response(answer)


class ChatForm(_Form):
    """How `POST /v1/chat/completions` is asked and answers."""

    path = CHAT

    def read(self, body: bytes, request: Request) -> Event:
        """What a request asks for."""
        return read_chat(body, self._limits, id=f"chatcmpl-{request.id}", now=self._clock.seconds())

    def whole(self, completion: Completion, event: Event, request: Request) -> Response:
        """The answer in one piece."""
        message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
        if completion.tool_calls is not None:
            message |= {"content": completion.text or None, "tool_calls": completion.tool_calls}
        if completion.reasoning is not None:
            message["reasoning_content"] = completion.reasoning
        logprobs = None
        if completion.logprobs is not None:
            logprobs = {"content": msgspec.Raw(completion.logprobs.encode()), "refusal": None}
        return self._answer("chat.completion", {"message": message, "logprobs": logprobs}, completion, event)


class TextForm(_Form):
    """How `POST /v1/completions` is asked and answers."""

    path = TEXT

    def __init__(self, limits: EventLimits, clock: IReactorTime, names: Callable[[], list[str]]):
        """@param names: of the models that the backends have."""
        super().__init__(limits, clock)
        self._names = names

    def read(self, body: bytes, request: Request) -> Event:
        """What a request asks for."""
        if is_tavern(body):
            return read_tavern(body, self._limits)
        return read_text(body, self._limits, id=f"cmpl-{request.id}", now=self._clock.seconds())

    def whole(self, completion: Completion, event: Event, request: Request) -> Response:
        """The answer in one piece."""
        event = event if event.chunks is not None else replace(event, chunks=self._tavern_chunks(request))
        return self._answer("text_completion", {"text": completion.text, "logprobs": None}, completion, event)

    def framing(self, event: Event, request: Request) -> Framing:
        """How the pieces of an answer look."""
        if event.chunks is not None:
            return super().framing(event, request)
        return TavernFraming(self._tavern_chunks(request), next(iter(self._names()), "unknown"))

    def _tavern_chunks(self, request: Request) -> Chunks:
        return Chunks(f"cmpl-{request.id}", int(self._clock.seconds()))


class OpenAIRoutes:
    """The table of OpenAI's surface."""

    def __init__(
        self, intake: Intake, *, limits: EventLimits, clock: IReactorTime, backends: Callable[[], list[BackendState]]
    ):
        self._intake = intake
        self._chat = ChatForm(limits, clock)
        self._text = TextForm(limits, clock, self._names)
        self._backends = backends
        self._started = int(clock.seconds())

    def routes(self) -> list[Route]:
        """The table."""
        return [
            Route(CHAT, {"POST": self.post_chat}, traced=True, aliases=(f"{CHAT}/",)),
            Route(TEXT, {"POST": self.post_text}, traced=True, aliases=(f"{TEXT}/",)),
            Route(MODELS, {"GET": self.get_models}, aliases=(f"{MODELS}/",)),
            Route(f"{MODELS}/{{id}}", {"GET": self.get_model}),
        ]

    async def post_chat(self, request: Request) -> Response | Streamed:
        """The next message of a conversation."""
        return await self._intake.answer(request, self._chat)

    async def post_text(self, request: Request) -> Response | Streamed:
        """What follows a prompt."""
        return await self._intake.answer(request, self._text)

    async def get_models(self, request: Request) -> Response:
        """The models that the backends have, as far as is known."""
        await self._intake.gate.admit(request)
        return json_response({"object": "list", "data": [self._model(name) for name in self._names()]})

    async def get_model(self, request: Request) -> Response:
        """One of them. There are slashes in the names of some, which callers escape or not."""
        await self._intake.gate.admit(request)
        name = unquote(request.path.removeprefix(f"{MODELS}/"), errors="replace")
        if name not in self._names():
            raise ModelNotFound
        return json_response(self._model(name))

    def _names(self) -> list[str]:
        return list(dict.fromkeys(state.model for state in self._backends() if state.model is not None))

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": OWNER}
