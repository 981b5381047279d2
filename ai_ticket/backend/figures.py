"""What KoboldCPP's answers leave out, or say wrong: how many tokens it was, and why it ended."""

from msgspec import Struct

from ai_ticket.backend.server import ModelServer
from ai_ticket.errors import DomainError
from ai_ticket.event import Usage

LONGEST_SECONDS = 1.0

_HARD_CODED_USAGE = Usage(100, 100, 200)
"""What KoboldCPP up to 1.77 says whatever it did."""


class _Figures(Struct):
    """Those of the last generation: `stop_reason` 0 out of tokens, 1 end of text, 2 stop sequence."""

    last_token_count: int
    last_input_count: int | None = None
    stop_reason: int | None = None


async def put_right(
    usage: Usage | None, reason: str | None, most_tokens: int, server: ModelServer, left: float
) -> tuple[Usage | None, str | None]:
    """The tokens, as far as they can be told, and why the answer ended.

    @param usage, reason: as the answer has them. @param most_tokens: that it could have had.
    @param left: seconds until the deadline.
    """
    usage = usage if usage != _HARD_CODED_USAGE else None
    figures = await _ask(server, left) if usage is None else None
    if figures is not None and figures.last_input_count is not None:
        total = figures.last_input_count + figures.last_token_count
        usage = Usage(figures.last_input_count, figures.last_token_count, total)
    return usage, _reason(reason, usage, figures, most_tokens)


async def _ask(server: ModelServer, left: float) -> _Figures | None:
    """The figures of the generation that just ended, which older versions and the native stream do not send.

    The answer is complete without them, so they are not waited for for long.
    """
    try:
        return await server.get("/api/extra/perf", _Figures, min(LONGEST_SECONDS, left / 2))
    except DomainError:
        return None


def _reason(reason: str | None, usage: Usage | None, figures: _Figures | None, most_tokens: int) -> str | None:
    """KoboldCPP says "length" also where a stop sequence ended the answer; then it has fewer tokens than allowed."""
    if reason != "length":
        return reason
    if figures is not None and figures.stop_reason is not None:
        return "length" if figures.stop_reason == 0 else "stop"
    if usage is not None and usage.completion_tokens < most_tokens:
        return "stop"
    return "length"
