"""The schemas of `/openapi.json`: what requests may hold, from the types that read them, and what answers do."""

from typing import Any, get_args

import msgspec

from ai_ticket.content import Role
from ai_ticket.event import LARGEST_SEED, EventLimits, FinishReason
from ai_ticket.web.faults import STATUSES
from ai_ticket.web.kobold_fields import CountFields, GenerateFields, KeyFields
from ai_ticket.web.openai_fields import ChatFields, ResponseFormat, TextFields, Tool

Json = dict[str, Any]

TEMPLATE = "#/components/schemas/{name}"

_TEXT: Json = {"type": "string"}
_WORD: Json = {"type": "string", "minLength": 1}
_NUMBER: Json = {"type": "number"}
_COUNT: Json = {"type": "integer", "minimum": 0}
_BOOLEAN: Json = {"type": "boolean"}
_ANY_OBJECT: Json = {"type": "object"}


def schemas(limits: EventLimits) -> Json:
    """All of them, by name, with the limits in force."""
    return {**_requests(limits), **_events(limits), **_openai(), **_kobold(), **_service()}


def _requests(limits: EventLimits) -> Json:
    """Of those that are read by types. What these leave raw for a closer look later is told here."""
    types = (ChatFields, TextFields, Tool, ResponseFormat, GenerateFields, KeyFields, CountFields)
    _, found = msgspec.json.schema_components(types, ref_template=TEMPLATE)
    tokens = _nullable({"type": "integer", "minimum": 1, "maximum": limits.max_tokens})
    stop = _nullable(_WORD, _list(_WORD, maxItems=16))
    common = {
        "max_tokens": tokens,
        "stop": stop,
        "n": _nullable({"const": 1}),
        "logit_bias": _nullable(_bias({"type": "number", "minimum": -100, "maximum": 100})),
    }
    choice = {"enum": ["none", "auto", "required"]}
    named = _object(type={"const": "function"}, function=_object(name=_WORD))
    found["ChatFields"]["properties"] |= common | {
        "messages": _list(_ref("ChatMessage"), minItems=1),
        "max_completion_tokens": tokens,
        "tools": _nullable(_list(_ref("Tool"), maxItems=128)),
        "tool_choice": _nullable(choice, named),
        "response_format": _nullable(_ref("ResponseFormat")),
        "metadata": _nullable({"type": "object", "additionalProperties": _TEXT, "maxProperties": 16}),
    }
    found["TextFields"]["properties"] |= common | {
        "prompt": {"anyOf": [_WORD, _list(_WORD, minItems=1, maxItems=1)]},
        "best_of": _nullable({"const": 1}),
        "echo": _nullable({"const": False}),
        "suffix": _nullable({"const": ""}),
    }
    nothing = _nullable(_list(_TEXT, maxItems=0))
    found["GenerateFields"]["properties"] |= {
        "prompt": _WORD,
        "logit_bias": _nullable(_bias({"type": "number"})),
        "max_length": tokens,
        "n": _nullable({"const": 1}),
        "logprobs": _nullable({"enum": [False, 0]}),
        "images": nothing,
        "audio": nothing,
    }
    return {name: _trimmed(schema) for name, schema in found.items()}


def _trimmed(schema: Json) -> Json:
    """Without the titles and the defaults, which tell nobody anything: None is absence."""
    schema.pop("title", None)
    if "description" in schema:
        schema["description"] = " ".join(schema["description"].split())
    for field in schema.get("properties", {}).values():
        field.pop("default", None)
    return schema


def _events(limits: EventLimits) -> Json:
    parts = _list({**_object(type={"const": "text"}, text=_TEXT)})
    message = _object(role={"enum": list(get_args(Role))}, content={"anyOf": [_TEXT, parts]})
    options = {
        "max_tokens": _nullable({"type": "integer", "minimum": 1, "maximum": limits.max_tokens}),
        "temperature": _nullable({"type": "number", "minimum": 0, "maximum": 5}),
        "top_p": _nullable({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
        "top_k": _nullable(_COUNT),
        "min_p": _nullable({"type": "number", "minimum": 0, "maximum": 1}),
        "seed": _nullable({"type": "integer", "minimum": 0, "maximum": LARGEST_SEED}),
        "stop": _nullable(_WORD, _list(_WORD, minItems=1, maxItems=16)),
    }
    messages = _list(_ref("Message"), minItems=1)
    item = {"anyOf": [_TEXT, _object(prompt=_TEXT), _ref("Message"), _object(messages=messages)]}
    content = {
        "description": "A prompt; or an object with messages or a prompt; or an array of such.",
        "anyOf": [
            _WORD,
            {"type": "object", "properties": {"messages": messages, "prompt": _TEXT, **options}},
            _list(item, minItems=1),
        ],
    }
    answer = _object(
        completion=_TEXT,
        finish_reason={"enum": list(get_args(FinishReason))},
        model=_TEXT,
        usage=_nullable(_ref("Usage")),
        request_id=_TEXT,
    )
    answer["properties"]["metadata"] = {"type": "object", "additionalProperties": _TEXT}
    error = _object(
        error={"enum": list(STATUSES)}, message=_TEXT, details={"type": ["string", "null"]}, request_id=_TEXT
    )
    place = _object(index=_COUNT, status={"type": "integer"})
    return {
        "Message": message,
        "Event": {
            **_object(content=content),
            "properties": {
                "content": content,
                "parameters": _nullable({"type": "object", "properties": options, "additionalProperties": False}),
                "stream": _nullable(_BOOLEAN),
                "metadata": _nullable(
                    {"type": "object", "additionalProperties": {"type": ["string", "null"]}, "maxProperties": 16}
                ),
            },
        },
        "Usage": _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT),
        "Answer": answer,
        "Piece": _object(delta=_TEXT, done={"const": False}),
        "End": _object(delta={"const": ""}, done={"const": True}, **_without(answer, "completion", "metadata")),
        "Error": error,
        "Result": {"allOf": [place, {"anyOf": [_ref("Answer"), _ref("Error")]}]},
    }


def _openai() -> Json:
    call = _object(id=_TEXT, type={"const": "function"}, function=_object(name=_TEXT, arguments=_TEXT))
    said = _object(role={"const": "assistant"}, content={"type": ["string", "null"]})
    said["properties"] |= {"tool_calls": _list(call), "reasoning_content": _TEXT, "refusal": {"type": "null"}}
    reason = {"enum": list(get_args(FinishReason))}
    of_chat = _object(index={"const": 0}, message=said, finish_reason=reason, logprobs={"type": ["object", "null"]})
    of_text = _object(index={"const": 0}, text=_TEXT, finish_reason=reason, logprobs={"type": ["object", "null"]})
    answers = {}
    for name, kind, choice in (("Chat", "chat.completion", of_chat), ("Text", "text_completion", of_text)):
        answer = _object(
            id=_TEXT, object={"const": kind}, created=_COUNT, model=_TEXT, choices=_list(choice, minItems=1, maxItems=1)
        )
        answer["properties"]["usage"] = _ref("Usage")
        answers[name] = answer
    model = _object(id=_TEXT, object={"const": "model"}, created=_COUNT, owned_by=_TEXT)
    error = _object(message=_TEXT, type=_TEXT, param={"type": ["string", "null"]}, code={"type": ["string", "null"]})
    return {
        **answers,
        "Model": model,
        "Models": _object(object={"const": "list"}, data=_list(_ref("Model"))),
        "OpenAIError": _object(error=error),
    }


def _kobold() -> Json:
    result = _object(
        text=_TEXT, tool_calls=_list(_ANY_OBJECT), finish_reason={"enum": ["stop", "length"]}, logprobs={"type": "null"}
    )
    result["properties"] |= {"prompt_tokens": _COUNT, "completion_tokens": _COUNT}
    word = {"enum": ["true", "false"]}
    detail = _object(msg=_TEXT, type=_TEXT, code={"enum": list(STATUSES)})
    detail["properties"]["error"] = {"const": "Unauthorized"}
    figures = dict.fromkeys(("last_process", "last_eval", "last_process_time", "last_eval_time"), _NUMBER)
    counts = dict.fromkeys(("last_token_count", "last_input_count", "total_gens", "queue"), _COUNT)
    return {
        "KoboldResults": _object(results=_list(result, minItems=1, maxItems=1)),
        "KoboldPiece": _object(token=_TEXT, finish_reason={"enum": [None, "stop", "length"]}),
        "KoboldTexts": _object(results=_list(_object(text=_TEXT), minItems=1, maxItems=1)),
        "KoboldAborted": _object(success=word, done=word),
        "KoboldTokens": _object(value=_COUNT, ids=_list(_COUNT), prompt=_TEXT),
        "KoboldText": _object(result=_TEXT),
        "KoboldNumber": _object(value={"type": "integer", "minimum": 1}),
        "KoboldVersion": _object(result={"const": "KoboldCpp"}, version=_TEXT, protected=_BOOLEAN, llm=_BOOLEAN),
        "KoboldPerf": _object(
            **figures, **counts, stop_reason={"enum": [-1, 0, 1]}, idle={"enum": [0, 1]}, uptime=_NUMBER
        ),
        "KoboldError": _object(detail=detail),
    }


def _service() -> Json:
    report = _object(
        status={"enum": ["healthy", "degraded", "draining"]},
        shutdown_initiated=_BOOLEAN,
        backends={"type": "object", "additionalProperties": _object(status={"enum": ["up", "down"]}, slots=_COUNT)},
    )
    return {"HealthReport": report, "HealthStatus": _object(status=_TEXT)}


def _bias(number: Json) -> Json:
    """Of tokens, by their numbers."""
    return {"type": "object", "propertyNames": {"pattern": "^[0-9]{1,10}$"}, "additionalProperties": number}


def _object(**properties: Json) -> Json:
    """An object that has all of these fields."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _without(schema: Json, *names: str) -> Json:
    """The fields of an object but for these."""
    return {name: field for name, field in schema["properties"].items() if name not in names}


def _list(items: Json, **more: int) -> Json:
    return {"type": "array", "items": items, **more}


def _nullable(*schemas: Json) -> Json:
    return {"anyOf": [*schemas, {"type": "null"}]}


def _ref(name: str) -> Json:
    return {"$ref": TEMPLATE.format(name=name)}
