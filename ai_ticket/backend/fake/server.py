"""The fake's HTTP surface, and what tests see of it and tell it."""

from collections.abc import Callable
from functools import partial
from typing import Any

from msgspec import Struct
from twisted.internet.interfaces import IAddress, IReactorTime
from twisted.internet.protocol import Factory

from ai_ticket.backend.fake import ask, wire
from ai_ticket.backend.fake.connection import LARGEST_BODY, Connection, Request, Threads
from ai_ticket.backend.fake.endpoints import Endpoints, parsed, path_of
from ai_ticket.backend.fake.engine import Engine, Settings
from ai_ticket.backend.fake.jobs import Calls, Outcome
from ai_ticket.backend.fake.script import HTML, Reply, Script

THREADS = 24
KEPT = 10_000
"""Requests that are remembered, at the least."""


class Seen(Struct, frozen=True):
    """A request that came, body included. `json` is the body's value, or None where it is no JSON."""

    at: float
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    json: Any


class _Order(Struct):
    """A script, and what for."""

    script: Script
    times: int | None
    path: str | None

    def fits(self, request: Request) -> bool:
        if self.path is not None:
            return path_of(request).endswith(self.path)
        return request.method == "POST" and ask.endpoint(path_of(request)) is not None


class FakeKobold(Factory):
    """A KoboldCPP that has no model. It is the factory of its connections: `listenTCP(0, fake)`.

    @ivar settings: what it is set to; may be changed at any time.
    @ivar behaviour: what it does where no script was given.
    @ivar missing: ends of paths that it is to do without.
    @ivar requests: what came, the last of it.
    """

    noisy = False

    def __init__(self, clock: IReactorTime, settings: Settings | None = None, *, threads: int = THREADS):
        self.settings = settings or Settings()
        self.behaviour = Script()
        self.requests: list[Seen] = []
        self._clock = clock
        self._calls = Calls(clock)
        self._threads = Threads(threads)
        self._engine = Engine(clock, self.settings)
        self._endpoints = Endpoints(clock, self.settings, self._engine)
        self._orders: list[_Order] = []
        self.missing = self._endpoints.missing

    def buildProtocol(self, addr: IAddress | None) -> Connection:
        """A connection comes in."""
        return Connection(self._threads, self._handle)

    # For tests.

    def script(self, script: Script, *, times: int | None = 1, path: str | None = None) -> None:
        """Do this with the next requests that generate, or with the next, GET included, whose path ends like this.

        @param times: with how many; None: with all from now on. Scripts are taken in the order in which they came.
        """
        self._orders.append(_Order(script, times, path))

    def clear(self) -> None:
        """Forget the scripts."""
        self._orders.clear()

    def kill(self) -> None:
        """End all connections and generations, as the end of the process does, and begin anew."""
        self._calls.cancel()
        self._engine.kill()
        for connection in list(self._threads.open):
            connection.on_lost = None
            connection.close()

    @property
    def running(self) -> int:
        """Generations that run."""
        return len(self._engine.jobs)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return self._engine.waiting

    @property
    def idle(self) -> bool:
        """Whether every slot is free. One stays taken until the connection of its answer is closed."""
        return self._engine.idle

    @property
    def rejected(self) -> int:
        """Requests that found the queue full."""
        return self._engine.rejected

    @property
    def finished(self) -> int:
        """Generations that came to their end."""
        return self._engine.outcomes[Outcome.FINISHED]

    @property
    def aborted(self) -> int:
        """Generations that were aborted."""
        return self._engine.outcomes[Outcome.ABORTED]

    @property
    def disconnected(self) -> int:
        """Generations that stopped because their callers had left."""
        return self._engine.outcomes[Outcome.DISCONNECTED]

    @property
    def aborts(self) -> list[str | None]:
        """The keys of the aborts that came; None: one without a key."""
        return self._engine.aborts

    @property
    def connections(self) -> int:
        """Open connections, those that are not served included."""
        return len(self._threads.open)

    @property
    def most_connections(self) -> int:
        """The largest number of open connections that there ever was."""
        return self._threads.most

    @property
    def stalled(self) -> bool:
        """Whether connections are left as they are once made: a TCP connection, and then nothing."""
        return self._threads.stalled

    @stalled.setter
    def stalled(self, stalled: bool) -> None:
        self._threads.stalled = stalled

    # Requests.

    def _handle(self, connection: Connection, request: Request) -> None:
        now, body = self._clock.seconds(), request.body
        self.requests.append(Seen(now, request.method, request.path, request.headers, body, parsed(body)))
        if len(self.requests) > 2 * KEPT:
            del self.requests[:-KEPT]
        script = self._script_for(request)
        if script.reply is not None:
            self._after(script.before_headers, self._send, connection, script.reply)
        elif ask.endpoint(path_of(request)) is not None:
            self._route(connection, request, script)
        else:
            self._after(script.before_headers, self._route, connection, request, script)

    def _script_for(self, request: Request) -> Script:
        for order in self._orders:
            if order.fits(request):
                if order.times is not None:
                    order.times -= 1
                    if order.times <= 0:
                        self._orders.remove(order)
                return order.script
        generates = request.method == "POST" and ask.endpoint(path_of(request)) is not None
        return self.behaviour if generates else Script()

    def _route(self, connection: Connection, request: Request, script: Script) -> None:
        if request.too_big:
            self._send(connection, Reply(500, wire.too_big(LARGEST_BODY)))
        elif request.method in ("OPTIONS", "HEAD"):
            connection.write(wire.head(200, HTML, self._clock.seconds()))
            connection.close()
        elif request.method == "GET":
            self._send(connection, self._endpoints.get(request))
        elif request.method != "POST":
            connection.write(wire.unsupported(request.method, self._clock.seconds()))
            connection.close()
        elif (answer := self._endpoints.post(request)) is not None:
            seconds, reply = answer
            self._after(seconds, self._send, connection, reply)
        elif not self._engine.enter(partial(self._with_slot, connection, request, script)):
            self._send(connection, Reply(503, wire.BUSY))

    def _with_slot(self, connection: Connection, request: Request, script: Script, release: Callable[[], None]) -> None:
        """A POST that has its slot. What does not exist, or may not be asked, waits for one as well."""
        path = path_of(request)
        suffix = ask.endpoint(path)
        if suffix is None or not self._endpoints.has(path, suffix):
            reply = Reply(404, b"", HTML)
        elif not self._endpoints.authorised(request):
            reply = Reply(401, wire.UNAUTHORIZED)
        else:
            try:
                asked = ask.read(suffix, request.body, self.settings.context_length)
            except ask.NotJSON:
                reply = Reply(500, wire.BAD_INPUT)
            except ask.Fatal:
                reply = Reply(body=None)
            else:
                if not asked.misread:
                    self._engine.generate(connection, asked, script, release)
                    return
                reply = Reply(stream=True) if asked.stream else Reply(200, b"null")
        self._send(connection, reply)
        release()

    def _send(self, connection: Connection, reply: Reply) -> None:
        now = self._clock.seconds()
        if reply.stream:
            connection.write(wire.head(reply.status, "text/event-stream", now, stream=True))
            return
        if reply.body is not None:
            length = len(reply.body) if reply.status == 200 else None
            connection.write(wire.head(reply.status, reply.content_type, now, length=length) + reply.body)
        connection.close()

    def _after(self, seconds: float, function: Callable[..., None], *arguments: Any) -> None:
        if seconds > 0:
            self._calls.later(seconds, function, *arguments)
        else:
            function(*arguments)
