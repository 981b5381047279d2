"""The fake's endpoints that do not generate, and so are answered at once also while a generation runs."""

import json
from typing import Any

from twisted.internet.interfaces import IReactorTime

from ai_ticket.backend.fake import ask, wire
from ai_ticket.backend.fake.connection import Request
from ai_ticket.backend.fake.engine import Engine, Settings
from ai_ticket.backend.fake.script import HTML, Reply
from ai_ticket.backend.fake.text import Tokenizer, chat_prompt

VERSION = "1.115.1"
_UNAUTHORIZED = Reply(401, wire.UNAUTHORIZED)
_ABSENT_PARTS = ("txt2img", "vision", "audio", "transcribe", "multiplayer", "websearch", "tts", "embeddings", "music")
_SECRET = ("/api/extra/generate/check", "/api/extra/last_logprobs")


def path_of(request: Request) -> str:
    """The path by whose end an endpoint is found: without the query, and without a slash at its end."""
    return request.path.partition("?")[0].rstrip("/")


def parsed(body: bytes) -> Any:
    """The JSON value, or None where it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


class Endpoints:
    """Answers what needs no slot.

    @ivar missing: ends of paths that are not there.
    """

    def __init__(self, clock: IReactorTime, settings: Settings, engine: Engine):
        self.missing: set[str] = set()
        self._clock = clock
        self._settings = settings
        self._engine = engine
        self._tokenizer = Tokenizer()

    def has(self, path: str, suffix: str) -> bool:
        """Whether this path means this endpoint, and it is there."""
        return path.endswith(suffix) and not any(path.endswith(gone) for gone in self.missing)

    def authorised(self, request: Request) -> bool:
        """Whether the request has the password, if there is one. The scheme is case-sensitive here."""
        password = self._settings.password
        return password is None or request.headers.get("authorization") == f"Bearer {password}"

    def get(self, request: Request) -> Reply:
        """The answer to any GET."""
        path = path_of(request)
        if any(self.has(path, suffix) for suffix in _SECRET) and not self.authorised(request):
            return _UNAUTHORIZED
        if self.has(path, "/slots"):
            return Reply(501, wire.encode(wire.NO_SLOTS))
        if self.has(path, "/v1"):
            return Reply(200, wire.ABOUT_V1, HTML)
        for suffix, value in self._facts(request).items():
            if self.has(path, suffix):
                return Reply(200, wire.encode(value))
        return Reply(404, wire.not_found(request.path), HTML)

    def post(self, request: Request) -> tuple[float, Reply] | None:
        """The answer to a POST, and in how many seconds; None if it needs a slot."""
        path = path_of(request)
        handlers = {
            "/api/extra/abort": self._abort,
            "/api/extra/generate/check": self._check,
            "/api/extra/tokencount": self._tokencount,
            "/api/extra/detokenize": self._detokenize,
        }
        handler = next((handlers[suffix] for suffix in handlers if self.has(path, suffix)), None)
        if handler is None:
            return None
        if not self.authorised(request):
            return 0.0, _UNAUTHORIZED
        fields = parsed(request.body)
        return handler(fields if isinstance(fields, dict) else {})

    def _facts(self, request: Request) -> dict[str, Any]:
        settings = self._settings
        model = settings.model or "inactive"
        shown = model if self.authorised(request) else "koboldcpp/protected-model"
        entry = {"id": model, "object": "model", "created": int(self._clock.seconds()), "owned_by": "koboldcpp"}
        return {
            "/api/extra/version": {
                "result": "KoboldCpp",
                "version": VERSION,
                "protected": settings.password is not None,
                "llm": settings.model is not None,
                **dict.fromkeys(_ABSENT_PARTS, False),
                "savedata": False,
                "admin": 0,
                "router": False,
                "guidance": False,
                "jinja": False,
                "mcp": False,
            },
            "/api/v1/info/version": {"result": "1.2.5"},
            "/api/version": {"version": "0.7.0"},
            "/api/v1/model": {"result": shown},
            "/api/latest/model": {"result": shown},
            "/v1/models": {"object": "list", "data": [{**entry, "permission": [], "root": "koboldcpp"}]},
            "/api/extra/true_max_context_length": {"value": settings.context_length},
            "/api/v1/config/max_context_length": {"value": settings.context_length},
            "/api/v1/config/max_length": {"value": ask.DEFAULT_LIMIT},
            "/api/extra/perf": self._engine.perf(),
            "/api/extra/generate/check": {"results": [{"text": self._engine.text_of("")}]},
            "/api/extra/last_logprobs": {"logprobs": None},
            "/api/admin/list_options": [],
            "/ping": {"status": "healthy"},
            "/props": {
                "chat_template": wire.CHAT_TEMPLATE,
                "id": 0,
                "id_task": -1,
                "total_slots": 1,
                "modalities": {"vision": False, "audio": False},
                "model_path": model,
                "n_ctx": settings.context_length,
                "default_generation_settings": {"n_ctx": settings.context_length},
            },
        }

    def _abort(self, fields: dict[str, Any]) -> tuple[float, Reply]:
        success, done = self._engine.abort(str(fields.get("genkey") or ""))
        words = {"success": str(success).lower(), "done": str(done).lower()}
        return self._settings.pace.abort if done else 0.0, Reply(200, wire.encode(words))

    def _check(self, fields: dict[str, Any]) -> tuple[float, Reply]:
        text = self._engine.text_of(str(fields.get("genkey") or ""))
        return 0.0, Reply(200, wire.encode({"results": [{"text": text}]}))

    def _tokencount(self, fields: dict[str, Any]) -> tuple[float, Reply]:
        try:
            if "messages" in fields:
                prompt = chat_prompt(ask.read_messages(fields["messages"]))
            else:
                prompt = fields.get("prompt", "")
        except ask.Fatal:
            return 0.0, Reply(body=None)
        ids = self._tokenizer.encode(str(prompt)) if self._settings.model is not None else []
        return 0.0, Reply(200, wire.encode({"value": len(ids), "ids": ids, "prompt": prompt}))

    def _detokenize(self, fields: dict[str, Any]) -> tuple[float, Reply]:
        ids = fields.get("ids")
        text = self._tokenizer.decode(ids if isinstance(ids, list) else [])
        return 0.0, Reply(200, wire.encode({"result": text, "success": True}))
