"""Whether a prompt and its answer fit the model's context: KoboldCPP would cut the prompt without a word."""

import sys
from typing import Any

from msgspec import Raw, Struct
from msgspec.structs import replace

from ai_ticket.backend.probe import KOBOLDCPP, LLAMACPP
from ai_ticket.backend.server import LARGEST_COUNT, ModelServer, NoSuchEndpoint
from ai_ticket.backend.tokens import tokenize
from ai_ticket.content import Message
from ai_ticket.errors import ContextLengthExceeded, DomainError
from ai_ticket.event import Event
from ai_ticket.interfaces import BackendState

TOKENS_AROUND_A_MESSAGE = 16
TOKENS_BEFORE_THE_FIRST = 256
"""More than chat templates add: some begin with a system message of their own where the caller sends none."""


class _Count(Struct):
    value: int


class _Prompt(Struct):
    prompt: str


async def fit(event: Event, server: ModelServer, state: BackendState, timeout: float) -> Event:
    """The event, its `max_tokens` lowered to what fits where the caller named none.

    A token stands for at least one byte, so most prompts are known to fit without asking the server to count.

    @raise ContextLengthExceeded: it does not fit.
    @raise DomainError: that can't be told, and the server would cut it.
    """
    context = state.context_length
    wanted = event.parameters.max_tokens
    if context is None or _most_tokens(event) + wanted <= context:
        return event
    try:
        prompt = await _count(event, server, state, timeout)
    except NoSuchEndpoint:
        return event  # nobody can tell
    except DomainError:
        if state.kind == KOBOLDCPP:
            raise
        return event  # the server has the last word: it refuses what does not fit
    if prompt is None or prompt + wanted <= context:
        return event
    if event.max_tokens_given or prompt >= context:
        raise ContextLengthExceeded(
            f"the prompt has {prompt} tokens and max_tokens is {wanted}; the model's context has {context} for both"
        )
    return replace(event, parameters=replace(event.parameters, max_tokens=context - prompt))


def _most_tokens(event: Event) -> int:
    if event.raw_prompt is not None:
        return len(event.raw_prompt.encode()) + TOKENS_AROUND_A_MESSAGE
    if "tools" in event.extra:
        return sys.maxsize  # how many words a template makes of them nobody knows
    texts = sum(len(message.content.encode()) for message in event.messages)
    return texts + TOKENS_BEFORE_THE_FIRST + TOKENS_AROUND_A_MESSAGE * len(event.messages)


async def _count(event: Event, server: ModelServer, state: BackendState, timeout: float) -> int | None:
    """The prompt's tokens by the server's own count, or None where it does not count."""
    prompt = event.raw_prompt
    if prompt is None:
        tools = event.extra.get("tools")
        if state.kind == KOBOLDCPP:
            # It does not count tools, and words them in some way of its own.
            more = [Message("system", tools)] if tools is not None else []
            asked: dict[str, Any] = {"messages": [*event.messages, *more]}
            return (await server.ask("/api/extra/tokencount", asked, _Count, timeout, LARGEST_COUNT)).value
        if state.kind != LLAMACPP:
            return None
        asked = {"messages": event.messages} | ({"tools": Raw(tools.encode())} if tools is not None else {})
        prompt = (await server.ask("/apply-template", asked, _Prompt, timeout, LARGEST_COUNT)).prompt
    tokens = await tokenize(prompt, server, state.kind, timeout)
    return None if tokens is None else tokens.count
