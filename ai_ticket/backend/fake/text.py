"""The fake's language model: how it counts tokens, what it says, and where it stops. Pure."""

import re
from collections.abc import Sequence
from itertools import cycle, islice
from zlib import crc32

from msgspec import Struct

BEGIN, END = "<|im_start|>", "<|im_end|>"
PASSAGE = (
    "This is a fake model, and it says the same to everybody. It has read nothing and knows nothing, but it counts its "
    "tokens well, it waits its turn, and it stops when it is told to. Ask a real one for more."
)

OUT_OF_TOKENS, END_OF_TEXT, STOP_SEQUENCE, FAILED, NONE_YET = 0, 1, 2, -2, -1
"""Why a generation stopped, as KoboldCPP's figures have it. One that was aborted is out of tokens."""

_BEGIN_ID, _END_ID = 1, 2
_TOKEN = re.compile(r"<\|im_(?:start|end)\|>|[ ']?[^\W\d_]{1,8}|\d| ?[^\w\s]|.", re.DOTALL)


def pieces(text: str) -> list[str]:
    """The tokens of a text, which joined are the text: words of up to eight letters, digits, signs.

    On the recorded exchanges it comes to the same numbers as the model that was recorded.
    """
    return _TOKEN.findall(text)


class Tokenizer:
    """Numbers for tokens, and back again for those that it has seen."""

    def __init__(self) -> None:
        self._seen: dict[int, str] = {}

    def encode(self, text: str) -> list[int]:
        """The ids, with the one that begins every prompt."""
        found = [self._id(piece) for piece in pieces(text)]
        return found if found[:1] == [_BEGIN_ID] else [_BEGIN_ID, *found]

    def decode(self, ids: Sequence[object]) -> str:
        """The text; an id that was never given out stands for nothing."""
        return "".join(self._seen.get(number, "") for number in ids if isinstance(number, int))

    def _id(self, piece: str) -> int:
        if piece in (BEGIN, END):
            return _BEGIN_ID if piece == BEGIN else _END_ID
        number = 3 + crc32(piece.encode("utf-8", "surrogatepass")) % 49_149
        self._seen[number] = piece
        return number


def chat_prompt(messages: Sequence[tuple[str, str]]) -> str:
    """A conversation, of roles and contents, in the tags that KoboldCPP guesses for the model that was recorded."""
    return "".join(f"{BEGIN}{role}\n{content}{END}\n" for role, content in messages) + f"{BEGIN}assistant\n"


class Plan(Struct, frozen=True):
    """A generation to come: the visible text, token by token, and how many tokens are generated for it.

    That may be more: the end of the text is a token, and so is what makes up a stop sequence, which is not shown.
    """

    pieces: list[str]
    tokens: int
    finish_reason: str
    stop_reason: int


NOTHING = Plan([], 0, "length", OUT_OF_TOKENS)
"""What comes of a negative limit, or of an abort that came first."""


def plan(answer: list[str], limit: int, stops: Sequence[str], *, endless: bool = False) -> Plan:
    """What comes of an answer under a limit of tokens and with stop sequences.

    @param endless: the model does not end, but says it all again.
    """
    if limit <= 0:
        return NOTHING
    shown = list(islice(cycle(answer), limit)) if endless and answer else answer[:limit]
    text = "".join(shown) if stops else ""
    ends = [(at + len(stop), at) for stop in stops if stop and (at := text.find(stop)) >= 0]
    if ends:
        end, at = min(ends)
        return Plan(_cut(shown, at), len(_cut(shown, end)), "length", STOP_SEQUENCE)
    if len(shown) < limit:
        return Plan(shown, len(shown) + 1, "stop", END_OF_TEXT)
    return Plan(shown, limit, "length", OUT_OF_TOKENS)


def _cut(shown: list[str], length: int) -> list[str]:
    """The first tokens, up to so many characters."""
    taken = []
    for piece in shown:
        if length <= 0:
            break
        taken.append(piece[:length])
        length -= len(piece)
    return taken
