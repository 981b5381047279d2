"""KoboldCPP's requests, read into events. Pure."""

import re
from typing import TypeVar

import msgspec

from ai_ticket import strictjson
from ai_ticket.content import absent
from ai_ticket.errors import InvalidRequest, UnsupportedParameter
from ai_ticket.event import LARGEST_TOP_K, Event, EventLimits, Parameters
from ai_ticket.strictjson import JSONError
from ai_ticket.web.kobold_fields import GenerateFields, Samplers, TavernFields
from ai_ticket.web.openai_faults import InvalidField

T = TypeVar("T")

_TOKEN = re.compile(r"\d{1,10}")
_PLACEHOLDER = "{{["
_ALIASES = {
    "ban_eos_token": ("use_default_badwordsids",),
    "rep_pen": ("repetition_penalty", "repeat_penalty"),
    "banned_tokens": ("banned_strings",),
}
"""Samplers, and what KoboldCPP takes in their place."""

_BANNED = -100.0
"""The bias of a token that is never to be chosen."""

_TAVERN = re.compile(rb'"api_type"\s*:\s*"koboldcpp"')


def read_generate(body: bytes, limits: EventLimits, *, stream: bool) -> Event:
    """What a request for a generation asks for.

    @raise DomainError: `InvalidRequest`, `InvalidField` or `UnsupportedParameter`.
    """
    return _event(read(body, GenerateFields), limits, stream=stream)


def is_tavern(body: bytes) -> bool:
    """Whether this is SillyTavern, which takes us for a KoboldCPP and speaks to its `/v1/completions`.

    It tells us so in a field of its own.
    """
    return _TAVERN.search(body) is not None


def read_tavern(body: bytes, limits: EventLimits) -> Event:
    """What such a request asks for; as `read_generate`. Its answer has OpenAI's form."""
    asked = read(body, TavernFields)
    length = "max_length"
    if asked.max_tokens is not None:
        length, asked.max_length = "max_tokens", asked.max_tokens
    asked.sampler_seed = asked.sampler_seed if asked.seed is None else asked.seed
    asked.stop_sequence = asked.stop_sequence if asked.stop is None else asked.stop
    return _event(asked, limits, stream=bool(asked.stream), length=length)


def _event(asked: GenerateFields, limits: EventLimits, *, stream: bool, length: str = "max_length") -> Event:
    """@param length: what the caller calls `max_length`."""
    prompt = (asked.memory or "") + asked.prompt
    if not prompt:
        raise InvalidField("prompt", "prompt: there must be one")
    wanted = asked.max_length
    if wanted is not None and not 1 <= wanted <= limits.max_tokens:
        raise InvalidField(length, f"{length} must be from 1 to {limits.max_tokens}")
    if asked.n not in (None, 1):
        raise _unsupported("n")
    for name, raw in (("images", asked.images), ("audio", asked.audio)):
        if not absent(raw) and bytes(raw).strip() != b"[]":  # type: ignore[arg-type]
            raise _unsupported(name)
    parameters = Parameters(
        max_tokens=min(limits.default_max_tokens, limits.max_tokens) if wanted is None else wanted,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=None if asked.top_k is None else min(max(0, asked.top_k), LARGEST_TOP_K),
        min_p=asked.min_p,
        seed=None if asked.sampler_seed == -1 else asked.sampler_seed,
        stop=_stop(asked.stop_sequence),
    )
    return Event(
        messages=[],
        parameters=parameters,
        max_tokens_given=wanted is not None,
        stream=stream,
        raw_prompt=prompt,
        extra=_extra(asked, prompt, parameters.stop),
        key=asked.genkey or "",
    )


def read(body: bytes, type: type[T]) -> T:
    """The fields of a request.

    @raise InvalidRequest: it is not JSON. @raise InvalidField: a field is of another type, or is missing.
    """
    try:
        strictjson.check(body)
        return strictjson.decode(body, type)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        missing = what.partition("missing required field `")[2][:-1]
        name = missing or path[:-1].removeprefix(".")
        message = f"{name}: {what}" if path.startswith(".") else what
        raise InvalidField(name or None, message, "missing_required_parameter" if missing else "invalid_value")
    except JSONError as error:
        raise InvalidRequest(str(error), message="The request is not valid JSON.")


def _stop(stop: str | list[str] | None) -> list[str] | None:
    stops = [stop] if isinstance(stop, str) else stop or []
    return [one for one in stops if one] or None


def _extra(asked: GenerateFields, prompt: str, stops: list[str] | None) -> dict[str, str]:
    found = {name: value for name in Samplers.__struct_fields__ if (value := getattr(asked, name)) is not None}
    for name, others in _ALIASES.items():
        for other in others:
            if found.get(name) in (None, []) and (value := getattr(asked, other)) is not None:
                found[name] = value
    bans = [token for one in (asked.custom_token_bans or "").split(",") if (token := one.strip())]
    if bans:
        found["logit_bias"] = {**(asked.logit_bias or {}), **dict.fromkeys(bans, _BANNED)}
    for name, tokens in (("logit_bias", asked.logit_bias or {}), ("custom_token_bans", bans)):
        if not all(_TOKEN.fullmatch(token) for token in tokens):
            raise InvalidField(name, f"{name} must name tokens by their numbers")
    if asked.logprobs:
        found["logprobs"] = True
    if not any(_PLACEHOLDER in text for text in (prompt, *(stops or ()))):
        found.pop("replace_instruct_placeholders", None)  # as Lite sends it, with nothing to replace
    return {name: msgspec.json.encode(value).decode() for name, value in found.items()}


def _unsupported(name: str) -> UnsupportedParameter:
    return UnsupportedParameter(name, message=f"What `{name}` asks for can't be done here.")
