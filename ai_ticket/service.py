"""The service tree: what starts in which order, what signals do, and what ends in which order."""

import resource
import signal
from collections.abc import Callable
from typing import Any

from twisted.application.service import IService, MultiService, Service
from twisted.internet.defer import CancelledError, Deferred, TimeoutError, maybeDeferred
from twisted.internet.task import LoopingCall
from twisted.logger import ILogObserver, Logger
from twisted.python.components import Componentized

from ai_ticket.drain import Ending
from ai_ticket.listening import Listeners
from ai_ticket.reload import Reloadable
from ai_ticket.systemd import Systemd
from ai_ticket.telemetry.logs import Logs
from ai_ticket.web.auth import InThread, TokenFile
from ai_ticket.web.connections import Connections

STOP_SECONDS = 10.0
"""How long a part of the background may take to end."""

LEAVE_SECONDS = 5.0
"""How long the process may take to go once all has ended: a thread may still be waiting for a name server."""

HURRIED_SECONDS = 0.5
"""The same after a second signal."""

CERTIFICATE_SECONDS = 86_400.0
"""Between two looks at whether the certificate is about to expire."""

SERVING = "serving"


class AITicket(MultiService):
    """The daemon. Its children are what runs in the background, in the order in which they start, and end."""

    _log = Logger()

    def __init__(
        self,
        *,
        reactor: Any,
        logs: Logs,
        warnings: list[str],
        listeners: Listeners,
        connections: list[Connections],
        drain: Ending,
        systemd: Systemd,
        reloadable: Reloadable,
        reload_interval: float,
        in_thread: InThread,
        settle: Callable[[], None],
        leave: Callable[[float], None],
    ):
        """@param settle: is called once all that stays is there.

        @param leave: has the process end within so many seconds, whatever its threads do, and hear no signal."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._reactor = reactor
        self._logs = logs
        self._warnings = warnings
        self._listeners = listeners
        self._connections = connections
        self._drain = drain
        self._systemd = systemd
        self._reloadable = reloadable
        self._in_thread = in_thread
        self._settle = settle
        self._leave = leave
        self._reload_interval = reload_interval
        self._token_watch = LoopingCall(self._reload_tokens, reloadable.token_file)
        self._certificate_watch = LoopingCall(self._warn_of_certificate)
        self._token_watch.clock = self._certificate_watch.clock = reactor
        self._reloads = 0
        self._draining: Deferred[None] | None = None
        self._ending: Deferred[None] | None = None
        self._hurried = False

    def setServiceParent(self, parent: IService) -> None:
        """Join an application, and give it our log: the same way from the .tac as from the plugin."""
        if isinstance(parent, Componentized):
            parent.setComponent(ILogObserver, self._logs)  # type: ignore[no-untyped-call]
        super().setServiceParent(parent)  # type: ignore[no-untyped-call]

    def startService(self) -> None:
        """Listen, then start the rest.

        @raise CannotStart: a port can't be listened on.
        """
        self._install_signals()
        self._logs.start()
        for warning in self._warnings:
            self._log.warn("{warning}", warning=warning)
        raise_file_limit()
        self._listeners.open()
        for connections in self._connections:
            connections.start()
        super().startService()  # type: ignore[no-untyped-call]
        if self._reloadable.token_file is not None:
            self._repeat(self._token_watch, self._reload_interval, "watching the token file failed")
        self._repeat(self._certificate_watch, CERTIFICATE_SECONDS, "watching the certificate failed")
        # Not only `callWhenRunning`, before which threads are started: for so long a signal would be the reactor's.
        self._reactor.addSystemEventTrigger("during", "startup", self._started)

    def _started(self) -> None:
        """The reactor has started, and has just set signal handlers of its own in the place of ours."""
        self._install_signals()
        self._settle()
        self._systemd.ready(SERVING)

    def _repeat(self, call: LoopingCall, seconds: float, failed: str) -> None:
        call.start(seconds, now=False).addErrback(lambda failure: self._log.failure(failed, failure))

    # The end.

    def stopService(self) -> Deferred[None]:
        """Cut what is open, and end the background, one part after the other; fires when all of it has ended."""
        Service.stopService(self)
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        for watch in (self._token_watch, self._certificate_watch):
            if watch.running:
                watch.stop()
        await self._listeners.close_at_once()
        for connections in self._connections:
            connections.stop()
        for child in self:
            if child.running:
                await self._ended(child)
        self._drain.report()
        self._systemd.stop()
        if self._draining is not None:
            self._leave(HURRIED_SECONDS if self._hurried else LEAVE_SECONDS)

    async def _ended(self, child: Service) -> None:
        """End a part of the background, which may take a while, but not for ever."""
        self._ending = maybeDeferred(child.stopService)
        self._ending.addTimeout(0 if self._hurried else STOP_SECONDS, self._reactor)
        await ended(child, self._ending, self._log, lambda: self._hurried)
        self._ending = None

    # Signals.

    def _install_signals(self) -> None:
        for number in _SIGNALS:
            act = self._reload_requested if number == signal.SIGHUP else self._stop_requested
            signal.signal(number, lambda *_, act=act: self._reactor.callFromThread(act))

    def _stop_requested(self) -> None:
        if self._draining is None:
            self._draining = Deferred.fromCoroutine(self._drain.run())
            self._draining.addErrback(lambda failure: self._log.failure("draining failed", failure))
            self._draining.addBoth(lambda _: self._reactor.stop() if self.running else None)
            return
        self._log.warn("stopping at once: told so a second time")
        self._hurried = True
        self._draining.cancel()
        if self._ending is not None:
            self._ending.cancel()

    def _reload_requested(self) -> None:
        self._logs.forget_repeats()
        self._log.info("reloading")
        self._systemd.reloading()
        self._reloads += 1
        Deferred.fromCoroutine(self._reload()).addErrback(
            lambda failure: self._log.failure("reloading failed", failure)
        ).addBoth(lambda _: self._reloaded())

    async def _reload(self) -> None:
        await self._reloadable.reload(self._in_thread)
        self._warn_of_certificate()

    def _reloaded(self) -> None:
        self._reloads -= 1
        if not self._reloads:
            self._systemd.ready(SERVING)

    # What is looked at from time to time.

    def _reload_tokens(self, token_file: TokenFile) -> Deferred[None]:
        return Deferred.fromCoroutine(token_file.reload(self._in_thread))

    def _warn_of_certificate(self) -> None:
        for warning in self._reloadable.certificate_warnings(self._reactor.seconds()):
            self._log.warn("{warning}", warning=warning)


async def ended(part: Service, ending: Deferred[Any], log: Logger, hurried: Callable[[], bool]) -> None:
    """Wait until a part of the background has ended, or that is given up; what is wrong with it is logged.

    @param ending: of the part. @param hurried: whether it had no time.
    """
    name = part.name or type(part).__name__
    try:
        await ending
    except (TimeoutError, CancelledError):
        if not hurried():
            log.warn("{part} did not end in time", part=name)
    except Exception:
        log.failure("{part} did not end as it should", part=name)


_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def raise_file_limit() -> None:
    """As many open files as the operator allows: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
