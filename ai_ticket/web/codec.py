"""What a connection, the HTTP version spoken on it, and those who answer requests know of each other."""

from typing import Protocol

from ai_ticket.web.request import HeaderList, Request


class Codec(Protocol):
    """One HTTP version on one connection."""

    deadline: float | None

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""

    def received(self, data: bytes) -> None:
        """Bytes have come."""

    def lost(self) -> None:
        """The connection is gone."""

    def check_deadlines(self, now: float) -> None:
        """End what has taken too long."""

    def leave(self) -> None:
        """Close, unless something is under way; then that closes it when it ends (see `Connections.leaving`)."""

    def advance(self) -> None:
        """Go on with what has come, in a turn of the reactor that has room for it (see `Connection.has_turn`)."""

    def slow_down(self) -> None:
        """The transport holds enough: no more of any answer should be written."""

    def speed_up(self) -> None:
        """The transport has room again."""


class Listener(Protocol):
    """What takes the requests that come in on connections."""

    def received(self, request: Request) -> None:
        """A request's head is complete."""

    def refuse(
        self, status: int, given: dict[bytes, bytes], peer: str, secure: bool, method: str | None = None
    ) -> tuple[HeaderList, bytes]:
        """Headers and body of the answer to what could not be read as a request; `given` are those that could."""
