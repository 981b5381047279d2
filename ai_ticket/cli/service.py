"""Where the service is, whom it may trust and which token it is shown: from the options, else the daemon's settings."""

import os
import re
from argparse import Namespace

from hyperlink import URL, URLParseError
from msgspec import Struct

from ai_ticket.cli import console, partial_settings, token_file
from ai_ticket.cli.outcome import CommandError, ExitStatus
from ai_ticket.environment import ConfigurationError, read_text
from ai_ticket.settings import DEFAULTS, Settings
from ai_ticket.urls import request_url

_WANTED = frozenset(
    {
        "TLS_PORT",
        "TLS_CERT_FILE",
        "AI_TICKET_AUTH_TOKEN",
        "AI_TICKET_AUTH_TOKEN_FILE",
        "REQUEST_TIMEOUT_SECONDS",
    }
)
_LOOPBACK = re.compile(r"localhost|127\.[0-9.]+|::1")
_NOTHING_CONFIGURED = "neither AI_TICKET_AUTH_TOKEN nor AI_TICKET_AUTH_TOKEN_FILE is set"


class Service(Struct, frozen=True, kw_only=True):
    """How to reach the service."""

    url: URL
    authorities: str | None
    """PEM text of certificates to trust besides the system's."""
    own: bool = False
    """The first of them is the service's own, which is then enough whatever name it is for."""
    timeout: float
    token: str | None = None
    no_token: str | None = None
    """Why there is none."""

    @property
    def address(self) -> str:
        """The URL, for messages."""
        return self.url.to_text()


class _NoToken(Exception):
    """There is no token to be had here; the message says why."""


def locate(options: Namespace, *, timeout: float | None = None, with_token: bool = False) -> Service:
    """Put together where to send requests; `timeout` is the default for the option, else the service's own deadline.

    To have no token is no fault here: only the service knows whether it asks for one.

    @raise CommandError: an option, or a file or setting that is needed, can't be used.
    """
    try:
        settings = partial_settings.read(os.environ, _WANTED)
    except ConfigurationError as error:
        if options.url is None:
            raise CommandError(
                "configuration_error",
                "The settings can't be used, and no --url is given.",
                details="\n".join(error.problems),
            )
        for problem in error.problems:
            console.warn(f"{problem} (ignored)")
        settings = DEFAULTS
    url = _url(options.url, settings)
    token, no_token = _token(options.token_file, settings) if with_token else (None, None)
    if token and url.scheme == "http" and not _LOOPBACK.fullmatch(url.host):
        console.warn(f"http: the token and the prompt go to {url.host} unencrypted")
    return Service(
        url=url,
        authorities=_authorities(options.cacert, settings),
        # On its own machine the service is asked as localhost, which a certificate for the world does not name.
        own=options.cacert is None and _LOOPBACK.fullmatch(url.host) is not None,
        # A little longer than the service's own deadline, so that its answer comes before we give up.
        timeout=options.timeout or timeout or settings.request_timeout_seconds + 10,
        token=token,
        no_token=no_token,
    )


def _url(given: str | None, settings: Settings) -> URL:
    if given is None:
        if settings.tls_port == 0:
            raise CommandError("configuration_error", "TLS_PORT=0 lets the kernel pick a port: give --url.")
        return URL(scheme="https", host="localhost", port=settings.tls_port)
    try:
        url = request_url(given)
    except (URLParseError, ValueError) as error:
        raise CommandError("usage", f"--url: not a URL: {error}", status=ExitStatus.USAGE)
    if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query or url.fragment:
        raise CommandError("usage", "--url: must be https://HOST[:PORT] or http://HOST[:PORT]", status=ExitStatus.USAGE)
    return url.replace(path=[segment for segment in url.path if segment])


def _authorities(given: str | None, settings: Settings) -> str | None:
    try:
        return read_text(given or settings.tls_cert_file)
    except (OSError, ValueError) as error:
        if given is None:  # most clients have no such file; where it was needed, the handshake will say so
            return None
        raise CommandError("usage", f"--cacert: {given} can't be read: {_reason(error)}", status=ExitStatus.USAGE)


def _token(given: str | None, settings: Settings) -> tuple[str | None, str | None]:
    """The token, or why there is none."""
    if given is not None:
        try:
            return _from_file(given), None
        except _NoToken as error:
            raise CommandError("token_file_error", f"--token-file: {error}")
    try:
        if settings.ai_ticket_auth_token is not None:
            words = (word.strip() for word in settings.ai_ticket_auth_token.split(","))
            return _sendable([word for word in words if word], "AI_TICKET_AUTH_TOKEN"), None
        if settings.ai_ticket_auth_token_file is not None:
            return _from_file(settings.ai_ticket_auth_token_file), None
    except _NoToken as error:
        return None, str(error)
    return None, _NOTHING_CONFIGURED


def _from_file(path: str) -> str:
    try:
        found = token_file.lines_of(read_text(path))
    except (OSError, ValueError) as error:
        raise _NoToken(f"{path} can't be read: {_reason(error)}")
    plain = [line.credential for line in found if not line.is_hash]
    if found and not plain:
        raise _NoToken(f"{path} holds only hashes of tokens, no token itself")
    return _sendable(plain, path)


def _sendable(tokens: list[str], where: str) -> str:
    """The first of them."""
    if not tokens:
        raise _NoToken(f"{where} holds no token")
    if not re.fullmatch(r"[\x20-\x7e]+", tokens[0]):
        raise _NoToken(f"the first token of {where} has characters that can't be sent")
    return tokens[0]


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
