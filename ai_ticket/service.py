"""The service tree: what starts in which order, what signals do, and the stop that waits for what is in flight."""

import errno
import resource
import signal
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

from msgspec import Struct
from twisted.application.service import IService, MultiService
from twisted.internet.defer import Deferred
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort, IProtocolFactory
from twisted.internet.task import LoopingCall
from twisted.logger import ILogObserver, Logger
from twisted.python.components import Componentized

from ai_ticket.reload import Reloadable
from ai_ticket.telemetry.logs import Logs
from ai_ticket.web.auth import InThread, TokenFile
from ai_ticket.web.connections import CLOSE_SECONDS, Connections
from ai_ticket.web.site import Site

BACKLOG = 1024
POLL_SECONDS = 0.05


class Endpoint(Struct, frozen=True):
    """A port to listen on. An empty host means all addresses, IPv6 and IPv4."""

    name: str
    variable: str
    host: str
    port: int
    factory: IProtocolFactory


class Phase(Enum):
    """Of the service's life."""

    SERVING = auto()
    DRAINING = auto()
    STOPPING = auto()


class AITicket(MultiService):
    """The daemon. Its children are what runs in the background: the model server, the prober."""

    _log = Logger()

    def __init__(
        self,
        *,
        reactor: Any,
        logs: Logs,
        warnings: list[str],
        endpoints: list[Endpoint],
        connections: list[Connections],
        site: Site,
        reloadable: Reloadable,
        reload_interval: float,
        grace: float,
        in_thread: InThread,
    ):
        super().__init__()  # type: ignore[no-untyped-call]
        self._reactor = reactor
        self._logs = logs
        self._warnings = warnings
        self._endpoints = endpoints
        self._connections = connections
        self._site = site
        self._reloadable = reloadable
        self._grace = grace
        self._in_thread = in_thread
        self._ports: list[IListeningPort] = []
        self._watch = LoopingCall(self._reload_tokens, reloadable.token_file)
        self._watch.clock = reactor
        self._reload_interval = reload_interval
        self._phase = Phase.SERVING

    @property
    def draining(self) -> bool:
        """Whether the service has been told to stop."""
        return self._phase is not Phase.SERVING

    def setServiceParent(self, parent: IService) -> None:
        """Join an application, and give it our log: the same way from the .tac as from the plugin."""
        if isinstance(parent, Componentized):
            parent.setComponent(ILogObserver, self._logs)  # type: ignore[no-untyped-call]
        super().setServiceParent(parent)  # type: ignore[no-untyped-call]

    def startService(self) -> None:
        """Listen, then start the rest.

        @raise SystemExit: a port can't be listened on; the log says which.
        """
        self._logs.start()
        for warning in self._warnings:
            self._log.warn("{warning}", warning=warning)
        _raise_file_limit()
        for endpoint in self._endpoints:
            self._listen(endpoint)
        for connections in self._connections:
            connections.start()
        super().startService()  # type: ignore[no-untyped-call]
        if self._reloadable.token_file is not None:
            self._watch.start(self._reload_interval, now=False).addErrback(
                lambda failure: self._log.failure("watching the token file failed", failure)
            )
        self._reactor.callWhenRunning(self._install_signals)

    async def _stop(self) -> None:
        if self._watch.running:
            self._watch.stop()
        for port in self._ports:
            await _stopped(port)
        for connections in self._connections:
            connections.stop()
        await super().stopService()  # type: ignore[no-untyped-call]

    def stopService(self) -> Deferred[None]:
        """Stop listening, cut what is open, and end the background; fires when all of it has ended."""
        self._phase = Phase.STOPPING
        return Deferred.fromCoroutine(self._stop())

    # Ports.

    def _listen(self, endpoint: Endpoint) -> None:
        hosts = [endpoint.host] if endpoint.host else ["::", "0.0.0.0"]
        for host in hosts:
            try:
                port = self._reactor.listenTCP(endpoint.port, endpoint.factory, backlog=BACKLOG, interface=host)
            except CannotListenError as error:
                # "::" takes IPv4 as well, but can't be had where IPv6 is switched off.
                in_use = getattr(error.socketError, "errno", None)
                if host == hosts[-1] or in_use in _TAKEN:
                    reason = getattr(error.socketError, "strerror", None) or str(error.socketError)
                    self._log.critical(
                        "{variable}={port}: can't listen on {host}: {reason}",
                        variable=endpoint.variable,
                        port=endpoint.port,
                        host=host,
                        reason=reason,
                    )
                    raise SystemExit(1)
            else:
                self._ports.append(port)
                self._log.info(
                    "listening for {endpoint} on {host} port {port}",
                    endpoint=endpoint.name,
                    host=host,
                    port=port.getHost().port,
                )
                return

    # Signals.

    def _install_signals(self) -> None:
        """Set our handlers; the reactor's own, which it sets when it starts, would end the process with status 143."""
        for number, act in (
            (signal.SIGTERM, self._stop_requested),
            (signal.SIGINT, self._stop_requested),
            (signal.SIGHUP, self._reload_requested),
        ):
            signal.signal(number, lambda *_, act=act: self._reactor.callFromThread(act))

    def _stop_requested(self) -> None:
        if self._phase is Phase.SERVING:
            self._phase = Phase.DRAINING
            self._log.info("stopping: {count} requests in flight", count=self._site.in_flight)
            Deferred.fromCoroutine(self._drain()).addErrback(
                lambda failure: self._log.failure("draining failed", failure)
            ).addBoth(lambda _: self._end())
        else:
            self._log.warn("stopping at once: told so a second time")
            self._end()

    def _end(self) -> None:
        if self._phase is not Phase.STOPPING:
            self._phase = Phase.STOPPING
            self._reactor.stop()

    async def _drain(self) -> None:
        """Close the ports, let what is in flight finish within the grace period, then close what is open."""
        for port in self._ports:
            await _stopped(port)
        self._ports.clear()
        for connections in self._connections:
            connections.drain()
        total = self._site.in_flight
        await self._wait_until(lambda: not self._site.in_flight, self._grace)
        cut = self._site.in_flight
        self._site.cut()
        await self._wait_until(lambda: not any(len(connections) for connections in self._connections), CLOSE_SECONDS)
        self._log.info("stopped: {finished} requests finished, {cut} cut", finished=total - cut, cut=cut)

    async def _wait_until(self, true: Callable[[], bool], seconds: float) -> None:
        end = self._reactor.seconds() + seconds
        while not true() and self._reactor.seconds() < end and self._phase is Phase.DRAINING:
            pause: Deferred[None] = Deferred()
            self._reactor.callLater(POLL_SECONDS, pause.callback, None)
            await pause

    # Reloading.

    def _reload_requested(self) -> None:
        self._logs.forget_repeats()
        self._log.info("reloading")
        Deferred.fromCoroutine(self._reloadable.reload(self._in_thread)).addErrback(
            lambda failure: self._log.failure("reloading failed", failure)
        )

    def _reload_tokens(self, token_file: TokenFile) -> Deferred[None]:
        return Deferred.fromCoroutine(token_file.reload(self._in_thread))


_TAKEN = (errno.EACCES, errno.EADDRINUSE)
"""What another address would not help against."""


async def _stopped(port: IListeningPort) -> None:
    stopping = port.stopListening()
    if stopping is not None:
        await stopping


def _raise_file_limit() -> None:
    """As many open files as the operator allows: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
