"""Who calls: the accepted tokens, which caller one names, and the token file being watched for changes."""

import hmac
import os
import re
from collections.abc import Awaitable, Callable
from hashlib import sha256
from typing import Any, Literal, Protocol

from twisted.internet.defer import DeferredLock
from twisted.logger import Logger

from ai_ticket.environment import read_file
from ai_ticket.interfaces import Client, Limiter, Recorder
from ai_ticket.tokens import Token, merge, parse_tokens
from ai_ticket.web.client_address import client_address, quota_key
from ai_ticket.web.faults import RateLimited, Unauthorised
from ai_ticket.web.request import Request

InThread = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs what blocks in a thread, and gives its result."""

INVALID_TOKENS = 10
INVALID_TOKENS_SECONDS = 60.0
"""So many invalid tokens an address may send within so many seconds before they are answered with 429."""


class Authenticator:
    """Knows the accepted tokens, those of the settings and those of the token file, and tells who a caller is.

    With `enabled` off everyone is let in, told apart by address.
    """

    def __init__(
        self,
        configured: list[Token],
        *,
        enabled: bool,
        recorder: Recorder,
        invalid_tokens: Limiter,
        trusted_proxies: int = 0,
        quota_by: Literal["ip", "token"] = "ip",
    ):
        """@param invalid_tokens: how many of them an address may send. Who has a valid one never meets it."""
        self._configured = configured
        self._from_file: list[Token] = []
        self._tokens = configured
        self._enabled = enabled
        self._recorder = recorder
        self._invalid_tokens = invalid_tokens
        self._trusted_proxies = trusted_proxies
        self._quota_by = quota_by

    def configure(self, tokens: list[Token]) -> None:
        """From now on accept these of the settings, in the place of those before.

        @raise ValueError: nobody could call any more.
        """
        merged = merge(tokens, self._from_file)
        if self._enabled and not merged:
            raise ValueError("no token would be left")
        self._configured, self._tokens = tokens, merged

    def accept(self, tokens: list[Token]) -> None:
        """From now on accept these of the token file, in the place of those before."""
        self._from_file = tokens
        self._tokens = merge(self._configured, self._from_file)

    async def authenticate(self, request: Request) -> Client:
        """Who sent the request.

        @raise Unauthorised: it has no valid token. @raise RateLimited: nor had many others from its address.
        """
        address = client_address(request.peer, request.headers.get(b"x-forwarded-for"), self._trusted_proxies)
        network = quota_key(address)
        if not self._enabled:
            return Client(key=network, name=None, address=address, quota=network)
        given = _given_token(request)
        if given is None:
            self._recorder.authentication_failed("missing")
            raise Unauthorised("no token in Authorization: Bearer or X-API-Key")
        token = self._find(given)
        if token is None:
            self._recorder.authentication_failed("invalid")
            await self._count_invalid(network)
            raise Unauthorised("the token is not valid")
        quota = network if self._quota_by == "ip" else token.key
        return Client(key=token.key, name=token.name, address=address, quota=quota, weight=token.weight)

    def _find(self, given: bytes) -> Token | None:
        digest = sha256(given).digest()
        found = None
        # Every token is compared, each in constant time: how long it takes tells nothing.
        for token in self._tokens:
            if hmac.compare_digest(token.digest, digest):
                found = token
        return found

    async def _count_invalid(self, network: str) -> None:
        admission = await self._invalid_tokens.admit(network)
        if not admission.admitted:
            self._recorder.rate_limited("invalid_token")
            raise RateLimited(
                "the token is not valid",
                message="Too many invalid tokens were sent from this address.",
                retry_after=admission.retry_after,
            )


def _given_token(request: Request) -> bytes | None:
    scheme, _, token = request.headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer" and token.strip():
        return token.strip()
    return request.headers.get(b"x-api-key", b"").strip() or None


class AcceptsTokens(Protocol):
    """An `Authenticator`, as far as the token file goes."""

    def accept(self, tokens: list[Token]) -> None:
        """From now on accept these of the token file, in the place of those before."""


class TokenFile:
    """The token file, read again when it has changed. What can't be read leaves the last good tokens in force."""

    _log = Logger()

    def __init__(self, path: str, authenticator: AcceptsTokens):
        self._path = path
        self._authenticator = authenticator
        self._seen: tuple[int, ...] | None = None
        self._complaint: str | None = None
        self._one_at_a_time = DeferredLock()

    def load(self) -> None:
        """Read the file now, blocking; for the start.

        @raise OSError: it can't be read. @raise ValueError: it is malformed or empty.
        """
        self._seen = _stat(self._path)
        self._authenticator.accept(parse_tokens(read_file(self._path)))

    async def reload(self, in_thread: InThread, *, force: bool = False) -> None:
        """Read the file if it has changed, or if told to."""
        async with self._one_at_a_time:
            await self._reload(in_thread, force)

    async def _reload(self, in_thread: InThread, force: bool) -> None:
        try:
            seen = await in_thread(lambda: _stat(self._path))
            if seen == self._seen and not force:
                return
            tokens = await in_thread(lambda: parse_tokens(read_file(self._path)))
        except (OSError, ValueError) as error:
            complaint = (error.strerror if isinstance(error, OSError) else None) or str(error)
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
        self._log.info("token file {path} read, tokens: {count}", path=self._path, count=len(tokens))


def _stat(path: str) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_mtime_ns, found.st_size, found.st_ino


def credentials(headers: dict[bytes, bytes]) -> list[bytes]:
    """The words of a request's head that may be a token. Headers that were sent twice come as one, joined by commas."""
    return re.split(rb"[\s,]+", headers.get(b"authorization", b"") + b"," + headers.get(b"x-api-key", b""))
