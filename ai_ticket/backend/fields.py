"""What a model server calls the things that callers ask for, and what it has no word for. Pure."""

from typing import Any

import msgspec
from msgspec import Raw

from ai_ticket.backend import samplers
from ai_ticket.backend.probe import KOBOLD_API, KOBOLDCPP
from ai_ticket.event import Event
from ai_ticket.interfaces import BackendState

_NATIVE = {
    "max_tokens": "max_length",
    "seed": "sampler_seed",
    "stop": "stop_sequence",
    "repeat_penalty": "rep_pen",
    "frequency_penalty": "presence_penalty",
}
"""What KoboldCPP's own endpoints call it. Of OpenAI's two penalties they have one, for which either is taken."""

_KOBOLDCPP_OPENAI = {"mirostat": "mirostat_mode"}

_CHAT_ALONE = frozenset({"tools", "tool_choice", "parallel_tool_calls", "response_format", "logprobs"})
_PENALTIES = ("presence_penalty", "frequency_penalty")


def fields(event: Event, kind: str | None, *, openai: bool) -> dict[str, Any]:
    """The fields of a request, but for its prompt, as a server of this kind calls them.

    @param openai: at an endpoint of OpenAI's, not one of KoboldCPP's own.
    """
    asked = msgspec.to_builtins(event.parameters)
    if event.extra:
        asked |= {name: Raw(text.encode()) for name, text in samplers.equivalents(event.extra, kind).items()}
        if _one_penalty(kind, openai=openai):
            _leave_out_neutral(asked, event.extra)
    names = _names(kind, openai=openai)
    return {names.get(name, name): value for name, value in asked.items()}


def refused(event: Event, state: BackendState, *, chat: bool, openai: bool) -> str | None:
    """The first of the event's fields that a server has no equivalent of there; None if it has of all.

    @param chat, openai: which endpoint it is.
    """
    if not chat and event.raw_prompt is None and not _is_a_prompt(event):
        return "messages"
    extra = event.extra
    for name in extra:
        if name in _CHAT_ALONE and not chat:
            return name
        if name == "tools" and state.tools is False:
            return name
        if name == "logprobs" and state.kind in (KOBOLDCPP, KOBOLD_API):
            return name  # it has them, but not in a stream
    if _one_penalty(state.kind, openai=openai) and all(_number(extra, name) for name in _PENALTIES):
        return "frequency_penalty"
    return samplers.missing(extra, state.kind, event.raw_prompt or "")


def _names(kind: str | None, *, openai: bool) -> dict[str, str]:
    if not openai:
        return _NATIVE
    return _KOBOLDCPP_OPENAI if kind == KOBOLDCPP else {}


def _one_penalty(kind: str | None, *, openai: bool) -> bool:
    """Whether the two of OpenAI's are one: KoboldCPP takes `frequency_penalty` only where the other is not given."""
    return not openai or kind == KOBOLDCPP


def _leave_out_neutral(asked: dict[str, Any], extra: dict[str, str]) -> None:
    if all(name in extra for name in _PENALTIES):
        neutral = next(name for name in reversed(_PENALTIES) if not _number(extra, name))
        del asked[neutral]


def _number(extra: dict[str, str], name: str) -> float:
    return float(extra.get(name, "0"))


def _is_a_prompt(event: Event) -> bool:
    """Whether nothing is lost where only the user's texts are taken, but for the roles."""
    if any(message.role == "tool" or message.tool_calls for message in event.messages):
        return False
    return bool(event.prompt.strip())
