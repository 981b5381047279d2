"""The description of the whole HTTP surface, in OpenAPI 3.1: served at `/openapi.json`, to anyone.

What the fields of requests are comes from the types that read them, so it can't say anything else.
`python -m ai_ticket.web.openapi > openapi.yaml` writes it as YAML with the limits that are there unless others are
set; that takes PyYAML.
"""

import sys
from typing import Any

import msgspec

from ai_ticket import __version__
from ai_ticket.event import EventLimits
from ai_ticket.web.openapi_schemas import schemas
from ai_ticket.web.request import Request, Response
from ai_ticket.web.site import Route

PATH = "/openapi.json"

Json = dict[str, Any]

EVENT, OPENAI, KOBOLD = "Error", "OpenAIError", "KoboldError"
"""The forms that errors have."""

_ASKING = (401, 429, 503)
_GENERATING = (400, 401, 411, 413, 415, 422, 429, 502, 503, 504)
_REASONS = {
    400: "The request can't be read, or a field has a wrong type or value.",
    401: "There is no valid token.",
    404: "There is no such thing.",
    411: "The size of the body is not announced (HTTP/1.1 only).",
    413: "The body is too large.",
    415: "The body is not JSON.",
    422: "There is no prompt, or it does not fit into the model's context.",
    429: "The caller's quota is used up.",
    502: "The model server failed.",
    503: "The queue is full, no model server is there, or the service is shutting down.",
    504: "The answer did not come in time.",
}


def openapi_route(limits: EventLimits, max_batch_events: int) -> Route:
    """`/openapi.json`, written once."""
    body = msgspec.json.encode(document(limits, max_batch_events))

    async def get_openapi(request: Request) -> Response:
        return Response(200, body)

    return Route(PATH, {"GET": get_openapi})


def document(limits: EventLimits, max_batch_events: int) -> Json:
    """The description, with the limits in force."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "AI Ticket",
            "version": __version__,
            "description": "Self-hosted language models behind one endpoint: events, OpenAI's surface and KoboldCPP's. "
            "Every answer has an `X-Request-ID`: the caller's own, if it is well formed, else a new one. "
            "HEAD works where GET does.",
        },
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}, {"key": []}],
        "tags": [{"name": name} for name in ("events", "openai", "kobold", "service")],
        "paths": {**_events(max_batch_events), **_openai(), **_kobold(), **_service()},
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
            "schemas": schemas(limits),
        },
    }


def _events(max_batch_events: int) -> Json:
    item = {"anyOf": [_ref("Event"), {"description": "What is no event fails alone."}]}
    batch = {
        "application/json": {"schema": {"type": "array", "maxItems": max_batch_events, "items": item}},
        "application/x-ndjson": {"schema": {"type": "string", "description": "An event on each line."}},
    }
    results = {
        "application/json": {"schema": {"type": "array", "items": _ref("Result")}},
        "application/x-ndjson": {"schema": {"type": "string", "description": "A result on each line, as each comes."}},
    }
    return {
        "/event": _post(
            "events",
            "One event in, one completion out",
            _body("Event"),
            _json("Answer") | _stream("Some text each, then the end or an error.", "Piece", "End", EVENT),
            _failures(EVENT, *_GENERATING),
        ),
        "/events": _post(
            "events",
            "Many events in, a result for each out",
            {"required": True, "content": batch},
            results,
            _failures(EVENT, 400, 401, 411, 413, 415, 429, 503),
        ),
    }


def _openai() -> Json:
    failures = _failures(OPENAI, *(status for status in _GENERATING if status != 422))
    chunks = _stream("One of OpenAI's chunks each, then `[DONE]` or an error.")
    return {
        "/v1/chat/completions": _post(
            "openai", "The next message of a conversation", _body("ChatFields"), _json("Chat") | chunks, failures
        ),
        "/v1/completions": _post(
            "openai", "What follows a prompt", _body("TextFields"), _json("Text") | chunks, failures
        ),
        "/v1/models": _get("openai", "The models", _json("Models"), _failures(OPENAI, *_ASKING)),
        "/v1/models/{id}": _get(
            "openai",
            "One of the models",
            _json("Model"),
            _failures(OPENAI, *_ASKING, 404),
            parameters=[{"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}],
        ),
    }


def _kobold() -> Json:
    failures = _failures(KOBOLD, *_GENERATING)
    asking = _failures(KOBOLD, *_ASKING)
    keyed = _failures(KOBOLD, 400, 401, 413, 429, 503)
    facts = {
        "/api/v1/model": ("The model", "KoboldText"),
        "/api/v1/info/version": ("The version of KoboldAI's API", "KoboldText"),
        "/api/v1/config/max_context_length": ("The tokens that prompt and answer may have", "KoboldNumber"),
        "/api/v1/config/max_length": ("The tokens that an answer may have", "KoboldNumber"),
        "/api/extra/true_max_context_length": ("The tokens that prompt and answer may have", "KoboldNumber"),
        "/api/extra/version": ("What clients may ask for", "KoboldVersion"),
        "/api/extra/perf": ("How busy the service is, and how one's own last generation went", "KoboldPerf"),
    }
    check = _json("KoboldTexts")
    return {
        "/api/v1/generate": _post(
            "kobold", "What follows a prompt", _body("GenerateFields"), _json("KoboldResults"), failures
        ),
        "/api/extra/generate/stream": _post(
            "kobold",
            "What follows a prompt, in pieces",
            _body("GenerateFields"),
            _stream("Some text each, the last with a reason to finish; or an error.", "KoboldPiece", KOBOLD),
            failures,
        ),
        "/api/extra/generate/check": {
            **_get("kobold", "What has come so far of one's own generation", check, asking),
            **_post(
                "kobold",
                "What has come so far of one's own generation",
                _body("KeyFields", required=False),
                check,
                keyed,
            ),
        },
        "/api/extra/abort": _post(
            "kobold", "End one's own generation", _body("KeyFields", required=False), _json("KoboldAborted"), keyed
        ),
        "/api/extra/tokencount": _post(
            "kobold",
            "A text in tokens",
            _body("CountFields"),
            _json("KoboldTokens"),
            _failures(KOBOLD, *(status for status in _GENERATING if status != 422)),
        ),
        **{path: _get("kobold", summary, _json(schema), asking) for path, (summary, schema) in facts.items()},
    }


def _service() -> Json:
    health = {path: ("HealthReport" if path == "/health" else "HealthStatus") for path in _PROBES}
    found = {
        path: _get("service", summary, _json(health[path]), _unwell(health[path]), public=True)
        for path, summary in _PROBES.items()
    }
    text = {"schema": {"type": "string"}}
    metrics = {"text/plain": text, "application/openmetrics-text": text}
    found["/metrics"] = _get("service", "Prometheus' metrics", metrics, {}, public=True)
    found[PATH] = _get(
        "service", "This description", {"application/json": {"schema": {"type": "object"}}}, {}, public=True
    )
    return found


_PROBES = {
    "/health": "How the service and its backends are",
    "/health/live": "Whether the process is alive",
    "/health/ready": "Whether events should be sent here",
}


def _unwell(schema: str) -> Json:
    return {"503": {"description": "Not ready, or shutting down.", "headers": _HEADERS, "content": _json(schema)}}


def _post(tag: str, summary: str, body: Json, answer: Json, failures: Json) -> Json:
    return {"post": _operation(tag, summary, answer, failures) | {"requestBody": body}}


def _get(tag: str, summary: str, answer: Json, failures: Json, *, public: bool = False, **more: Any) -> Json:
    operation = _operation(tag, summary, answer, failures) | more
    return {"get": operation | ({"security": []} if public else {})}


def _operation(tag: str, summary: str, answer: Json, failures: Json) -> Json:
    success = {"description": "As it was asked for.", "headers": _HEADERS, "content": answer}
    return {"tags": [tag], "summary": summary, "responses": {"200": success, **failures}}


def _body(schema: str, *, required: bool = True) -> Json:
    return {"required": required, "content": _json(schema)}


def _json(schema: str) -> Json:
    return {"application/json": {"schema": _ref(schema)}}


def _stream(description: str, *data: str) -> Json:
    """Server-sent events, of which OpenAPI 3.1 describes each one.

    @param data: what may be in them, where that is JSON.
    """
    content: Json = {"type": "string"}
    if data:
        content |= {"contentMediaType": "application/json", "contentSchema": {"anyOf": [_ref(name) for name in data]}}
    event = {
        "type": "object",
        "description": description,
        "properties": {"event": {"enum": ["message", "error"]}, "data": content},
        "required": ["data"],
    }
    return {"text/event-stream": {"schema": event}}


def _ref(schema: str) -> Json:
    return {"$ref": f"#/components/schemas/{schema}"}


def _failures(form: str, *statuses: int) -> Json:
    return {str(status): _failure(form, status) for status in sorted(statuses)}


def _failure(form: str, status: int) -> Json:
    headers = dict(_HEADERS)
    if status in (429, 503):
        headers["Retry-After"] = {"schema": {"type": "integer", "minimum": 1}, "description": "In seconds."}
    if status == 401:
        headers["WWW-Authenticate"] = {"schema": {"const": "Bearer"}, "required": True}
    return {"description": _REASONS[status], "headers": headers, "content": _json(form)}


_HEADERS: Json = {
    "X-Request-ID": {"schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"}, "required": True},
}


if __name__ == "__main__":
    from ai_ticket.settings import Settings  # of which the room knows nothing

    unset = Settings()
    described = document(EventLimits(unset.max_tokens_limit, unset.default_max_tokens), unset.max_batch_events)
    sys.stdout.buffer.write(msgspec.yaml.encode(described))
