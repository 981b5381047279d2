"""What a well-formed request head is (RFC 9110, 9112, 9113), beyond what the parsers see to themselves."""

import re
from collections.abc import Iterable

from msgspec import Struct

MAX_HEAD_BYTES = 16_384
MAX_HEAD_FIELDS = 100

_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+;=%-]*)(?::[0-9]*)?")
_PATH = re.compile(rb"/[!\"$-~]*")
"""A path and a query; a `#` is no part of either."""
_ABSOLUTE = re.compile(rb"https?://([^/?#]+)(?:[/?][!\"$-~]*)?", re.IGNORECASE)

_LENGTH = re.compile(rb"[0-9]{1,20}")
_METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_VALUE = re.compile(rb"(?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?")
_PSEUDO = frozenset({b":method", b":scheme", b":authority", b":path"})
_OF_CONNECTIONS = frozenset({b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"})


def is_sound(method: str, target: bytes, version: str, headers: dict[bytes, bytes]) -> bool:
    """Whether an HTTP/1 head that llhttp has let through is well-formed. Repeated headers come joined by commas."""
    host = headers.get(b"host")
    # A repeated Host has a comma, which one host is not taken to have.
    if version == "1.1" if host is None else _HOST.fullmatch(host) is None:
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
        return b":" in target and _HOST.fullmatch(target) is not None
    if _PATH.fullmatch(target) is not None:
        return True
    if target == b"*":
        return method == "OPTIONS"
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None or _HOST.fullmatch(absolute[1]) is None:
        return False
    # A caller must send the same host twice (3.2.2). If it did not, who is in front of us may have read the other one.
    return host is None or absolute[1].lower() == host.lower()


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
    def too_large(self) -> bool:
        """Whether it is larger than the service takes."""
        return self.size > MAX_HEAD_BYTES or self.fields > MAX_HEAD_FIELDS


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
    if authority is None or _HOST.fullmatch(authority) is None or host not in (None, authority):
        return False
    if not _is_length(headers.get(b"content-length")) or headers.get(b"te", b"trailers").lower() != b"trailers":
        return False
    if method == b"CONNECT":
        return path is None and b":scheme" not in pseudo
    if path is None or b":scheme" not in pseudo or _METHOD.fullmatch(method) is None:
        return False
    return _PATH.fullmatch(path) is not None or (path == b"*" and method == b"OPTIONS")


def are_trailers(fields: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether these fields may follow a body on HTTP/2."""
    return all(_NAME.fullmatch(name) is not None and _VALUE.fullmatch(value) is not None for name, value in fields)
