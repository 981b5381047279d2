"""What a well-formed request head is (RFC 9110, 9112, 9113), beyond what the parsers see to themselves."""

import re
from collections.abc import Iterable
from socket import AF_INET6, inet_pton

from msgspec import Struct

MAX_HEAD_BYTES = 16_384
MAX_HEAD_FIELDS = 100

REQUEST_LINE = re.compile(rb"(?:\r\n)?[^ \r\n]+ [^ \r\n]+ HTTP/[0-9]\.[0-9]\r\n")
"""What an HTTP/1 head starts with: its request line, which one empty line may precede.

llhttp lets through several spaces in it, any number of bare line ends before it, and RTSP and ICE in HTTP's place. What
is between the spaces it looks at by itself.
"""

_HOST = re.compile(
    rb"(?:\[([0-9A-Fa-f:.]+)\]|[A-Za-z0-9._~!$&'()*+;=-]*(?:%[0-9A-Fa-f]{2}[A-Za-z0-9._~!$&'()*+;=-]*)*)(?::[0-9]*)?"
)
_PATH = re.compile(rb"/[!\"$-~]*")
"""A path and a query; a `#` is no part of either."""
_ABSOLUTE = re.compile(rb"https?://([^/?#]+)(?:[/?][!\"$-~]*)?", re.IGNORECASE)

_SCHEME = re.compile(rb"https?", re.IGNORECASE)
_LENGTH = re.compile(rb"[0-9]{1,20}")
_METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_VALUE = re.compile(rb"(?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?")
_PSEUDO = frozenset({b":method", b":scheme", b":authority", b":path"})
_METHODS = frozenset(
    "ACL BIND CHECKOUT CONNECT COPY DELETE GET HEAD LINK LOCK M-SEARCH MERGE MKACTIVITY MKCALENDAR MKCOL MOVE NOTIFY"
    " OPTIONS PATCH POST PROPFIND PROPPATCH PURGE PUT QUERY REBIND REPORT SEARCH SOURCE SUBSCRIBE TRACE UNBIND UNLINK"
    " UNLOCK UNSUBSCRIBE".split()
)
"""Those that llhttp knows. On HTTP/1.1 it refuses others, so they are refused on HTTP/2, too."""

_OF_CONNECTIONS = frozenset({b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"})


def is_sound(method: str, target: bytes, version: str, headers: dict[bytes, bytes]) -> bool:
    """Whether an HTTP/1 head that llhttp has let through is well-formed. Repeated headers come joined by commas."""
    host = headers.get(b"host")
    # A repeated Host has a comma, which one host is not taken to have.
    if version == "1.1" if host is None else not _is_host(host):
        return False
    if not _is_length(headers.get(b"content-length")):
        return False
    coding = headers.get(b"transfer-encoding")
    if version == "1.0":
        return coding is None and _is_target(method, target, host)
    return version == "1.1" and (coding is None or coding.lower() == b"chunked") and _is_target(method, target, host)


def _is_target(method: str, target: bytes, host: bytes | None) -> bool:
    """Whether it is one of the four forms, and the one that the method takes (RFC 9112, 3.2)."""
    if method == "CONNECT":
        return b":" in target and _is_host(target)
    if _PATH.fullmatch(target) is not None:
        return True
    if target == b"*":
        return method == "OPTIONS"
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None or not _names_host(absolute[1]):
        return False
    # A caller must send the same host twice (3.2.2). If it did not, who is in front of us may have read the other one.
    return host is None or absolute[1].lower() == host.lower()


def _is_host(value: bytes) -> bool:
    """Whether it is a host, which may be empty, and perhaps a port (RFC 3986, 3.2.2)."""
    found = _HOST.fullmatch(value)
    if found is None or found[1] is None:
        return found is not None
    try:
        inet_pton(AF_INET6, found[1].decode("ascii"))
    except OSError:
        return False
    return True


def _names_host(authority: bytes) -> bool:
    """Whether it is one that the URI of a request may have, and not an empty one (RFC 9110, 4.2.1)."""
    return authority[:1] not in (b"", b":") and _is_host(authority)


def _is_length(value: bytes | None) -> bool:
    return value is None or _LENGTH.fullmatch(value) is not None


class Http2Head(Struct, frozen=True, gc=False):
    """The head of a request on HTTP/2. `size` is in bytes, as SETTINGS_MAX_HEADER_LIST_SIZE counts them."""

    method: str
    target: bytes
    headers: dict[bytes, bytes]
    size: int
    fields: int

    @property
    def refusal(self) -> int | None:
        """The status of the answer to a head that is well-formed, and not looked at any further; None for others."""
        if self.size > MAX_HEAD_BYTES or self.fields > MAX_HEAD_FIELDS:
            return 431
        return None if self.method in _METHODS else 400


def http2_head(fields: Iterable[tuple[bytes, bytes]]) -> Http2Head | None:
    """The head that these fields make (RFC 9113, 8.2 and 8.3), or None where they are malformed."""
    pseudo: dict[bytes, bytes] = {}
    headers: dict[bytes, bytes] = {}
    size = count = 0
    for name, value in fields:
        count += 1
        size += len(name) + len(value) + 32
        if _VALUE.fullmatch(value) is None:
            return None
        if name in _PSEUDO:
            if headers or name in pseudo:
                return None
            pseudo[name] = value
        elif _NAME.fullmatch(name) is None or name in _OF_CONNECTIONS:
            return None
        else:
            known = headers.get(name)
            headers[name] = value if known is None else known + b", " + value
    if not _is_request(pseudo, headers):
        return None
    return Http2Head(pseudo[b":method"].decode("ascii"), pseudo.get(b":path", b""), headers, size, count)


def _is_request(pseudo: dict[bytes, bytes], headers: dict[bytes, bytes]) -> bool:
    method, path = pseudo.get(b":method", b""), pseudo.get(b":path")
    host, authority = headers.get(b"host"), pseudo.get(b":authority")
    if authority is None:
        authority = host
    if authority is None or not _names_host(authority) or host not in (None, authority):
        return False
    if not _is_length(headers.get(b"content-length")) or headers.get(b"te", b"trailers").lower() != b"trailers":
        return False
    if method == b"CONNECT":
        return path is None and b":scheme" not in pseudo
    if path is None or _SCHEME.fullmatch(pseudo.get(b":scheme", b"")) is None or _METHOD.fullmatch(method) is None:
        return False
    return _PATH.fullmatch(path) is not None or (path == b"*" and method == b"OPTIONS")


def are_trailers(fields: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether these fields may follow a body on HTTP/2."""
    return all(_NAME.fullmatch(name) is not None and _VALUE.fullmatch(value) is not None for name, value in fields)
