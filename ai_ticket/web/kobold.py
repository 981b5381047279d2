"""KoboldCPP's own surface, `/api/...`, for KoboldAI Lite, SillyTavern and scripts: on the one engine like the others.

Requests that generate count against the rate limit; the others only ask, many clients do so all the time.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from twisted.internet.interfaces import IReactorTime

from ai_ticket.errors import DomainError, NoBackendAvailable
from ai_ticket.event import Completion, Event, EventLimits
from ai_ticket.interfaces import BackendState, Figures, Generations, Tokens
from ai_ticket.web.intake import JSON, Intake, require_size, require_type
from ai_ticket.web.kobold_faults import kobold_error_event
from ai_ticket.web.kobold_fields import CountFields, KeyFields
from ai_ticket.web.kobold_requests import read, read_generate
from ai_ticket.web.request import Request, Response
from ai_ticket.web.site import Handler, Route, json_response
from ai_ticket.web.streaming import Streamed

GENERATE, STREAM = "/api/v1/generate", "/api/extra/generate/stream"
CHECK, ABORT, COUNT = "/api/extra/generate/check", "/api/extra/abort", "/api/extra/tokencount"

API_VERSION, VERSION = "1.2.5", "1.115.1"
"""Of KoboldAI's API, and the KoboldCPP whose ways these are: clients look at them to see what they can ask for."""

NAME_PREFIX = "koboldcpp/"
SMALL_BODY = 4096

_ABSENT = (
    "txt2img vision audio transcribe multiplayer websearch tts embeddings music savedata router guidance jinja mcp"
).split()
"""Further parts that a KoboldCPP may have."""

_STOP_REASONS = {None: -1, "length": 0, "stop": 1, "tool_calls": 1}


class _Frame(msgspec.Struct, gc=False):
    token: str
    finish_reason: str | None


class _Framing:
    """The pieces of an answer."""

    def text(self, text: str) -> bytes:
        """Some text."""
        return b"event: message\ndata: " + msgspec.json.encode(_Frame(text, None)) + b"\n\n"

    def end(self, completion: Completion) -> bytes:
        """The end of an answer that is complete."""
        return b"event: message\ndata: " + msgspec.json.encode(_Frame("", completion.finish_reason)) + b"\n\n"

    def error(self, error: DomainError) -> bytes:
        """The end of one that failed."""
        return kobold_error_event(error)


class _Form:
    """How text is asked for, and given."""

    def __init__(self, path: str, limits: EventLimits):
        self.path = path
        self._limits = limits

    def read(self, body: bytes, request: Request) -> Event:
        """What a request asks for."""
        return read_generate(body, self._limits, stream=self.path == STREAM)

    def whole(self, completion: Completion, event: Event, request: Request) -> Response:
        """The answer in one piece."""
        result: dict[str, Any] = {
            "text": completion.text,
            "tool_calls": [],
            "finish_reason": completion.finish_reason,
            "logprobs": None,
        }
        if completion.usage is not None:
            result["prompt_tokens"] = completion.usage.prompt_tokens
            result["completion_tokens"] = completion.usage.completion_tokens
        return json_response({"results": [result]})

    def framing(self, event: Event, request: Request) -> _Framing:
        """How the pieces of an answer look."""
        return _Framing()


class KoboldRoutes:
    """The table of KoboldCPP's surface."""

    def __init__(
        self,
        intake: Intake,
        *,
        limits: EventLimits,
        clock: IReactorTime,
        backends: Callable[[], list[BackendState]],
        generations: Generations,
        tokenize: Callable[[str], Awaitable[Tokens | None]],
        protected: bool,
    ):
        """@param protected: a token is asked for."""
        self._intake = intake
        self._generate = _Form(GENERATE, limits)
        self._stream = _Form(STREAM, limits)
        self._limits = limits
        self._clock = clock
        self._started = clock.seconds()
        self._backends = backends
        self._generations = generations
        self._tokenize = tokenize
        self._protected = protected

    def routes(self) -> list[Route]:
        """The table."""
        return [
            _route(GENERATE, {"POST": self.post_generate}, "/api/latest/generate", traced=True),
            _route(STREAM, {"POST": self.post_stream}, traced=True),
            _route(CHECK, {"GET": self.check, "POST": self.check}),
            _route(ABORT, {"POST": self.post_abort}, "/api/v1/abort", "/api/latest/abort"),
            _route(COUNT, {"POST": self.post_count}),
            _route("/api/v1/model", {"GET": self._fact(self._model)}, "/api/latest/model"),
            _route("/api/v1/info/version", {"GET": self._fact(_api_version)}, "/api/latest/info/version"),
            _route("/api/extra/version", {"GET": self._fact(self._version)}),
            _route(
                "/api/v1/config/max_context_length",
                {"GET": self._fact(self._context)},
                "/api/latest/config/max_context_length",
            ),
            _route("/api/v1/config/max_length", {"GET": self._fact(self._max_length)}, "/api/latest/config/max_length"),
            _route("/api/extra/true_max_context_length", {"GET": self._fact(self._context)}),
            _route("/api/extra/perf", {"GET": self.get_perf}),
        ]

    async def post_generate(self, request: Request) -> Response | Streamed:
        """What follows a prompt, in one piece."""
        return await self._intake.answer(request, self._generate)

    async def post_stream(self, request: Request) -> Response | Streamed:
        """What follows a prompt, in pieces."""
        return await self._intake.answer(request, self._stream)

    async def check(self, request: Request) -> Response:
        """What has come so far of one's own generation."""
        client = await self._intake.gate.identify(request)
        text = await self._generations.text(client.key, await _key(request))
        return json_response({"results": [{"text": text}]})

    async def post_abort(self, request: Request) -> Response:
        """End one's own generation; without a key the only one that there is."""
        client = await self._intake.gate.identify(request)
        word = "true" if await self._generations.stop(client.key, await _key(request)) else "false"
        return json_response({"success": word, "done": word})

    async def post_count(self, request: Request) -> Response:
        """A text's tokens."""
        await self._intake.gate.identify(request)
        require_type(request, JSON)
        require_size(request, self._intake.max_body)
        asked = read(await request.read_body(self._intake.max_body), CountFields)
        tokens = await self._tokenize(asked.prompt)
        if tokens is None:
            raise NoBackendAvailable("none that counts tokens")
        return json_response({"value": tokens.count, "ids": tokens.ids, "prompt": asked.prompt})

    async def get_perf(self, request: Request) -> Response:
        """How busy the service is, and how the caller's own last generation went."""
        client = await self._intake.gate.identify(request)
        return json_response(self._perf(await self._generations.figures(client.key)))

    def _fact(self, find: Callable[[], dict[str, Any]]) -> Handler:
        """What is known without asking anybody."""

        async def get_fact(request: Request) -> Response:
            await self._intake.gate.identify(request)
            return json_response(find())

        return get_fact

    def _model(self) -> dict[str, Any]:
        names = [state.model for state in self._usable() if state.model is not None]
        return {"result": NAME_PREFIX + names[0].removeprefix(NAME_PREFIX) if names else "inactive"}

    def _version(self) -> dict[str, Any]:
        return {
            "result": "KoboldCpp",
            "version": VERSION,
            "protected": self._protected,
            "llm": True,
            **dict.fromkeys(_ABSENT, False),
            "admin": 0,
        }

    def _context(self) -> dict[str, Any]:
        """The least of all: nobody can tell where a prompt will go."""
        lengths = [state.context_length for state in self._usable() if state.context_length is not None]
        if not lengths:
            raise NoBackendAvailable("none says how long its context is")
        return {"value": min(lengths)}

    def _max_length(self) -> dict[str, Any]:
        return {"value": self._limits.max_tokens}

    def _usable(self) -> list[BackendState]:
        states = self._backends()
        return [state for state in states if state.up] or states

    def _perf(self, figures: Figures) -> dict[str, Any]:
        read, written = figures.prompt_tokens, figures.completion_tokens
        return {
            "last_process": _milliseconds_each(figures.prompt_seconds, read),
            "last_eval": _milliseconds_each(figures.seconds, written),
            "last_token_count": written,
            "last_input_count": read,
            "last_process_time": figures.prompt_seconds,
            "last_eval_time": figures.seconds,
            "last_process_speed": _per_second(read, figures.prompt_seconds),
            "last_eval_speed": _per_second(written, figures.seconds),
            "last_seed": -1,
            "last_draft_success": 0,
            "last_draft_failed": 0,
            "total_gens": figures.generations,
            "stop_reason": _STOP_REASONS[figures.finish_reason],
            "total_img_gens": 0,
            "total_tts_gens": 0,
            "total_transcribe_gens": 0,
            "queue": figures.queue,
            "idle": 0 if figures.in_flight else 1,
            "hordeexitcounter": -1,
            "uptime": self._clock.seconds() - self._started,
            "idletime": figures.idle_seconds,
            "quiet": True,
        }


def _route(path: str, handlers: Mapping[str, Handler], *aliases: str, traced: bool = False) -> Route:
    """KoboldCPP takes a slash at the end of any path as well, and some clients send one."""
    names = (path, *aliases)
    return Route(path, handlers, traced, (*aliases, *(f"{name}/" for name in names)))


async def _key(request: Request) -> str:
    """What the caller calls its generation; nothing where there is no body to say so."""
    body = b"" if request.method == "GET" else await request.read_body(SMALL_BODY)
    return read(body, KeyFields).genkey or "" if body.strip() else ""


def _api_version() -> dict[str, Any]:
    return {"result": API_VERSION}


def _milliseconds_each(seconds: float, tokens: int) -> float:
    return 1000 * seconds / tokens if tokens else 0.0


def _per_second(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds else 0.0
