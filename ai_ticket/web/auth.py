"""Tokens: what a token file says, which caller a token names, and the file being watched for changes."""

import hmac
import os
import re
from collections.abc import Awaitable, Callable
from hashlib import sha256
from typing import Any

from msgspec import Struct
from twisted.logger import Logger

from ai_ticket.environment import read_text
from ai_ticket.interfaces import Client, Recorder
from ai_ticket.web.faults import Unauthorised
from ai_ticket.web.request import Request

InThread = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs what blocks in a thread, and gives its result."""

TOKEN_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
HASH_PREFIX = "sha256:"
_HASH = re.compile(r"[0-9a-fA-F]{64}")


class Token(Struct, frozen=True):
    """An accepted token: only its SHA-256 digest is kept, and the name that its file gives it."""

    digest: bytes
    name: str | None

    @property
    def key(self) -> str:
        """Tells tokens apart without giving them away."""
        return self.digest.hex()[:16]


def parse_tokens(text: str) -> list[Token]:
    """Read a token file: one token a line, `#` comments and blank lines left out.

    @raise ValueError: a line is malformed, or there is no token at all; the message names the line, not its content.
    """
    tokens = []
    for number, line in enumerate(text.split("\n"), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) > 2:
            raise ValueError(f"line {number}: more than a name and a token")
        name = words[0] if len(words) == 2 else None
        if name is not None and not TOKEN_NAME.fullmatch(name):
            raise ValueError(f"line {number}: a name is 1 to 64 of A-Z a-z 0-9 . _ -")
        tokens.append(Token(_digest(words[-1], number), name))
    if not tokens:
        raise ValueError("no token in it")
    return tokens


def _digest(word: str, number: int) -> bytes:
    if not word.startswith(HASH_PREFIX):
        return sha256(word.encode()).digest()
    hexadecimal = word.removeprefix(HASH_PREFIX)
    if not _HASH.fullmatch(hexadecimal):
        raise ValueError(f"line {number}: {HASH_PREFIX} is not followed by 64 hexadecimal digits")
    return bytes.fromhex(hexadecimal)


def parse_token_list(text: str) -> list[Token]:
    """Read the comma-separated tokens of AI_TICKET_AUTH_TOKEN."""
    words = (word.strip() for word in text.split(","))
    return [Token(sha256(word.encode()).digest(), None) for word in words if word]


class Authenticator:
    """Knows the accepted tokens. With `enabled` off everyone is let in, told apart by address."""

    def __init__(self, fixed: list[Token], *, enabled: bool, recorder: Recorder):
        self._fixed = fixed
        self._tokens = list(fixed)
        self._enabled = enabled
        self._recorder = recorder

    def accept(self, tokens: list[Token]) -> None:
        """From now on accept these, and the fixed ones."""
        self._tokens = [*self._fixed, *tokens]

    def authenticate(self, request: Request) -> Client:
        """Who sent the request.

        @raise Unauthorised: it has no valid token.
        """
        if not self._enabled:
            return Client(key=request.peer, name=None, address=request.peer)
        given = _given_token(request)
        if given is None:
            self._recorder.authentication_failed("missing")
            raise Unauthorised("no token in Authorization: Bearer or X-API-Key")
        digest = sha256(given).digest()
        found = None
        # Every token is compared, each in constant time: how long it takes tells nothing.
        for token in self._tokens:
            if hmac.compare_digest(token.digest, digest):
                found = token
        if found is None:
            self._recorder.authentication_failed("invalid")
            raise Unauthorised("the token is not valid")
        return Client(key=found.key, name=found.name, address=request.peer)


def _given_token(request: Request) -> bytes | None:
    scheme, _, token = request.headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer" and token.strip():
        return token.strip()
    return request.headers.get(b"x-api-key", b"").strip() or None


class TokenFile:
    """The token file, read again when it has changed. What can't be read leaves the last good tokens in force."""

    _log = Logger()

    def __init__(self, path: str, authenticator: Authenticator):
        self._path = path
        self._authenticator = authenticator
        self._seen: tuple[int, ...] | None = None
        self._complaint: str | None = None

    def load(self) -> None:
        """Read the file now, blocking; for the start.

        @raise OSError: it can't be read. @raise ValueError: it is malformed or empty.
        """
        self._seen = _stat(self._path)
        self._authenticator.accept(parse_tokens(read_text(self._path)))

    async def reload(self, in_thread: InThread, *, force: bool = False) -> None:
        """Read the file if it has changed, or if told to."""
        try:
            seen = await in_thread(lambda: _stat(self._path))
            if seen == self._seen and not force:
                return
            tokens = await in_thread(lambda: parse_tokens(read_text(self._path)))
        except (OSError, ValueError) as error:
            complaint = error.strerror if isinstance(error, OSError) else str(error)
            if complaint != self._complaint or force:
                self._log.error(
                    "token file {path} can't be used, the tokens read last stay in force: {reason}",
                    path=self._path,
                    reason=complaint,
                )
            self._complaint = complaint
            return
        self._seen, self._complaint = seen, None
        self._authenticator.accept(tokens)
        self._log.info("token file {path} read: {count} tokens", path=self._path, count=len(tokens))


def _stat(path: str) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_mtime_ns, found.st_size, found.st_ino
