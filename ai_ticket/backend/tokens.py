"""A text in tokens, by a model server's own count."""

from msgspec import Struct

from ai_ticket.backend.probe import KOBOLDCPP, LLAMACPP
from ai_ticket.backend.server import LARGEST_COUNT, ModelServer
from ai_ticket.interfaces import Tokens


class _Count(Struct):
    """KoboldCPP's answer; older versions tell the number alone."""

    value: int
    ids: list[int] | None = None


class _Tokens(Struct):
    """llama.cpp's answer."""

    tokens: list[int]


async def tokenize(text: str, server: ModelServer, kind: str | None, timeout: float) -> Tokens | None:
    """The text's tokens, with the one that begins every prompt; None where a server of this kind does not tell.

    @param timeout: in seconds.
    @raise DomainError: as `ModelServer.ask`.
    """
    if kind == KOBOLDCPP:
        count = await server.ask("/api/extra/tokencount", {"prompt": text}, _Count, timeout, LARGEST_COUNT)
        return Tokens(count.value, count.ids or [])
    if kind == LLAMACPP:
        asked = {"content": text, "add_special": True}
        ids = (await server.ask("/tokenize", asked, _Tokens, timeout, LARGEST_COUNT)).tokens
        return Tokens(len(ids), ids)
    return None
