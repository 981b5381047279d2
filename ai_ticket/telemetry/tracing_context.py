"""W3C trace context: whose trace a request belongs to, read from the caller's headers and written into ours.

https://www.w3.org/TR/trace-context/
"""

import re

from msgspec import Struct

SAMPLED = 1
RANDOM = 2
"""Flags: the trace is recorded; its id is random, so that others may sample by it."""

_LONGEST = 512
_MOST_MEMBERS = 32
_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)
_MEMBER = re.compile(
    r"([a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
    r"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)


class TraceContext(Struct, frozen=True):
    """A span as other services know it. The ids are lower-case hexadecimal; `state` is other tracers' own."""

    trace_id: str
    span_id: str
    flags: int
    state: str = ""

    @property
    def sampled(self) -> bool:
        """Whether the trace is recorded, as far as this span knows."""
        return bool(self.flags & SAMPLED)

    def headers(self) -> dict[str, str]:
        """The headers that hand it on."""
        found = {"traceparent": f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"}
        if self.state:
            found["tracestate"] = self.state
        return found


def parse(traceparent: bytes, tracestate: bytes | None) -> TraceContext | None:
    """Read a request's headers; None where `traceparent` is malformed. A malformed `tracestate` counts as absent."""
    found = _TRACEPARENT.fullmatch(traceparent) if len(traceparent) <= _LONGEST else None
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == b"ff" or (version == b"00" and more is not None) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return TraceContext(
        trace_id.decode(),
        span_id.decode(),
        int(flags, 16) & (SAMPLED | RANDOM),
        "" if tracestate is None else _state(tracestate),
    )


def _state(tracestate: bytes) -> str:
    if len(tracestate) > _LONGEST:
        return ""
    members = [stripped for member in tracestate.decode("latin-1").split(",") if (stripped := member.strip(" \t"))]
    found = [_MEMBER.fullmatch(member) for member in members]
    keys = {one[1] for one in found if one is not None}
    return ",".join(members) if len(keys) == len(members) <= _MOST_MEMBERS else ""
