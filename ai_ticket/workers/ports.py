"""The ports as a worker has them: shared with the other workers, who all are woken by each newcomer."""

import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from twisted.internet.interfaces import IDelayedCall

from ai_ticket.listening import Endpoint, Listeners
from ai_ticket.workers.messages import PassedPort

REST_SECONDS = 0.0005
"""That a worker who has taken a caller leaves the next one to the others, if they are free."""

YIELD_SECONDS = 0.002
"""That one who has more callers than the others leaves a newcomer to them."""


class InheritedPorts(Listeners):
    """Ports that the parent holds.

    Twisted takes all who wait, a hundred at first, and the kernel wakes whoever is idle, often the same: left to
    themselves, one worker would have nearly all callers, and keep them.
    """

    def __init__(
        self, reactor: Any, endpoints: Sequence[Endpoint], ports: Sequence[PassedPort], ahead: Callable[[], bool]
    ):
        """@param ahead: whether this worker has more callers than the others."""
        super().__init__(reactor, endpoints, lambda names: {})
        self._ports = ports
        self._ahead = ahead
        self._resting: dict[Any, IDelayedCall] = {}
        self._yielded: set[Any] = set()

    def open(self) -> None:
        """Listen."""
        endpoints = {endpoint.name: endpoint for endpoint in self._endpoints}
        for passed in self._ports:
            with socket.socket(fileno=passed.fd) as listening:  # which is duplicated
                endpoint = endpoints[passed.name]
                port = self._reactor.adoptStreamPort(listening.fileno(), listening.family, endpoint.factory)
            port.doRead = partial(self._newcomer, port)
            (self._bound if passed.ours else self._adopted).append(port)
            self._let_in_by(endpoint, port)

    def accept(self, accept: bool) -> None:
        """As `Listeners.accept`."""
        super().accept(accept)
        for port in self._resting:  # it is looked at again by itself
            port.stopReading()

    async def close(self) -> None:
        """As `Listeners.close`; whoever waits is taken at once."""
        self._no_more_turns()
        await super().close()

    async def close_at_once(self) -> None:
        """As `Listeners.close_at_once`."""
        self._no_more_turns()
        await super().close_at_once()

    def _newcomer(self, port: Any) -> None:
        if self._ahead() and port not in self._yielded:
            self._yielded.add(port)
            self._rest(port, YIELD_SECONDS)
            return
        self._yielded.discard(port)
        port.numberAccepts = 1
        type(port).doRead(port)
        self._rest(port, REST_SECONDS)

    def _rest(self, port: Any, seconds: float) -> None:
        port.stopReading()
        self._resting[port] = self._reactor.callLater(seconds, self._look_again, port)

    def _look_again(self, port: Any) -> None:
        del self._resting[port]
        if self._accepting:
            port.startReading()

    def _no_more_turns(self) -> None:
        for port in [*self._bound, *self._adopted]:
            port.__dict__.pop("doRead", None)
        for call in self._resting.values():
            call.cancel()
        self._resting.clear()
