"""Access tokens as the settings and the token file write them. Reads text alone: no file, nothing of the network.

A line of the token file is `token`, `name token` or `name;weight=4 token`. `sha256:<hex>` may stand for any token.
Blank lines and those that begin with `#` say nothing.
"""

import re
from collections.abc import Iterable
from hashlib import sha256

from msgspec import Struct

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
LARGEST_WEIGHT = 100
HASH_PREFIX = "sha256:"

_HASH = re.compile(r"[0-9a-fA-F]{64}")
_WEIGHT = re.compile(r"weight=([0-9]{1,9})")


class Token(Struct, frozen=True):
    """An accepted token: its SHA-256 digest, not itself; the name of who has it; its turns in a round of the queue."""

    digest: bytes
    name: str | None = None
    weight: int = 1

    @property
    def key(self) -> str:
        """Tells tokens apart without giving them away."""
        return self.digest.hex()[:16]


class Line(Struct, frozen=True):
    """The words of a line, not yet judged. `parameters` is what stands between the name's first `;` and its end."""

    credential: str
    name: str | None = None
    parameters: str | None = None

    @property
    def is_hash(self) -> bool:
        """Whether the token itself is not there."""
        return self.credential.startswith(HASH_PREFIX)

    @property
    def text(self) -> str:
        """The line as it is written."""
        name = self.name if self.parameters is None else f"{self.name};{self.parameters}"
        return self.credential if name is None else f"{name} {self.credential}"

    def token(self) -> Token:
        """What the line says.

        @raise ValueError: it is malformed; the message has nothing of what it says.
        """
        if self.name is not None and not NAME.fullmatch(self.name):
            raise ValueError("a name is 1 to 64 of A-Z a-z 0-9 . _ -")
        if not self.is_hash:
            return Token(_digest(self.credential), self.name, self._weight())
        hexadecimal = self.credential.removeprefix(HASH_PREFIX)
        if not _HASH.fullmatch(hexadecimal):
            raise ValueError(f"{HASH_PREFIX} is not followed by 64 hexadecimal digits")
        return Token(bytes.fromhex(hexadecimal), self.name, self._weight())

    def _weight(self) -> int:
        if self.parameters is None:
            return 1
        found = _WEIGHT.fullmatch(self.parameters)
        if found is None:
            raise ValueError(f"after ; only weight=N may stand, a whole number from 1 to {LARGEST_WEIGHT}")
        weight = int(found[1])
        if not 1 <= weight <= LARGEST_WEIGHT:
            raise ValueError(f"a weight is a whole number from 1 to {LARGEST_WEIGHT}")
        return weight


def read_line(line: str) -> Line | None:
    """Take a line apart; None where it says nothing.

    @raise ValueError: it has more words than a line may have.
    """
    words = line.removeprefix("\ufeff").split()  # a byte order mark, in a file that was read without regard to it
    if not words or words[0].startswith("#"):
        return None
    if len(words) > 2:
        raise ValueError("more than a name and a token")
    if len(words) == 1:
        return Line(words[0])
    name, separator, parameters = words[0].partition(";")
    return Line(words[1], name, parameters if separator else None)


def parse_tokens(text: str) -> list[Token]:
    """Read a token file. A token that is there twice counts once, under its name if one of the lines gives it one.

    @raise ValueError: a line is malformed or contradicts another, or there is no token at all; the message names the
        line, not its content.
    """
    found: dict[bytes, tuple[int, Token]] = {}
    for number, text_line in enumerate(text.split("\n"), start=1):
        try:
            line = read_line(text_line)
            if line is None:
                continue
            token = line.token()
        except ValueError as error:
            raise ValueError(f"line {number}: {error}")
        first, known = found.setdefault(token.digest, (number, token))
        if known.name is None:
            found[token.digest] = number, token
        elif token.name is not None and token != known:
            raise ValueError(f"line {number}: the token of line {first} with another name or weight")
    if not found:
        raise ValueError("no token in it")
    return [token for _, token in found.values()]


def parse_token_list(text: str) -> list[Token]:
    """Read the comma-separated tokens of AI_TICKET_AUTH_TOKEN, each as it is: no names, no hashes."""
    words = (word.strip() for word in text.split(","))
    return [Token(_digest(word)) for word in words if word]


def _digest(token: str) -> bytes:
    # An environment variable may have bytes that are not UTF-8; callers send the same bytes.
    return sha256(token.encode(errors="surrogateescape")).digest()


def merge(nameless: Iterable[Token], named: Iterable[Token]) -> list[Token]:
    """Both together; a token of both is the one that may have a name."""
    return list({token.digest: token for token in [*nameless, *named]}.values())
