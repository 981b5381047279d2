"""Operations of a trace, as all rooms see them; `telemetry.tracing` records them."""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

SpanKind = Literal["internal", "server", "client"]
Attributes = Mapping[str, str | bool | int | float | Sequence[str] | None]
"""What a span says of its operation. None is left out."""


class Span(Protocol):
    """One operation of a trace.

    It is handed on, never looked up: what belongs to an operation gets its span, and begins its own as a `child`.
    After the end nothing of it changes. It may hold no token, prompt or completion.
    """

    @property
    def trace_id(self) -> str | None:
        """32 hexadecimal digits; None where there is no trace."""

    @property
    def span_id(self) -> str | None:
        """16 hexadecimal digits; None where there is no trace."""

    @property
    def recording(self) -> bool:
        """Whether anything that it is told is kept: where not, nothing need be worked out for it."""

    def child(
        self,
        name: str,
        *,
        kind: SpanKind = "internal",
        attributes: Attributes | None = None,
        links: "Sequence[Span]" = (),
        at: float | None = None,
    ) -> "Span":
        """Begin an operation that is part of this one.

        @param links: spans that it has to do with, of this trace or another.
        @param at: the clock's time, in seconds; now by default.
        """

    def set(self, attributes: Attributes) -> None:
        """Say something of the operation."""

    def link(self, span: "Span") -> None:
        """The operation has to do with another."""

    def fail(self, code: str) -> None:
        """The operation failed; `code` is from a fixed set, such as a `DomainError`'s."""

    def headers(self) -> dict[str, str]:
        """The headers of a request to another service that make what happens there part of the operation."""

    def end(self, at: float | None = None) -> None:
        """The operation has ended, now or at that time of the clock."""


class Tracer(Protocol):
    """Begins traces."""

    def start(
        self,
        name: str,
        *,
        kind: SpanKind = "internal",
        traceparent: bytes | None = None,
        tracestate: bytes | None = None,
        attributes: Attributes | None = None,
        links: Sequence[Span] = (),
        at: float | None = None,
    ) -> Span:
        """Begin an operation that is part of no other here.

        @param traceparent: with `tracestate`, the headers of the request that asks for it; it then belongs to the
            caller's trace. What is malformed counts as absent.
        """


class NoSpan:
    """The `Span` of what is not traced."""

    __slots__ = ()
    recording = False

    @property
    def trace_id(self) -> str | None:
        """None: there is no trace."""
        return None

    @property
    def span_id(self) -> str | None:
        """None: there is no trace."""
        return None

    def child(
        self,
        name: str,
        *,
        kind: SpanKind = "internal",
        attributes: Attributes | None = None,
        links: Sequence[Span] = (),
        at: float | None = None,
    ) -> Span:
        """Itself: what is part of it is not traced either."""
        return self

    def set(self, attributes: Attributes) -> None:
        """Is not kept."""

    def link(self, span: Span) -> None:
        """Is not kept."""

    def fail(self, code: str) -> None:
        """Is not kept."""

    def headers(self) -> dict[str, str]:
        """None."""
        return {}

    def end(self, at: float | None = None) -> None:
        """Is not kept."""


NO_SPAN: Span = NoSpan()
