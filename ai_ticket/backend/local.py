"""The bundled model server: llama.cpp in a child process, started, watched and ended with the service."""

import os
import sys
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec
from automat import TypeMachineBuilder
from twisted.application.internet import backoffPolicy
from twisted.application.service import Service
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.interfaces import IDelayedCall, IProcessTransport, IReactorProcess, IReactorTime
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from ai_ticket.backend.address import Location
from ai_ticket.backend.llama_child import Ready, ServerConfig

CONTEXT_LENGTH = 8192  # tokens for each slot: all that the bundled model knows, at 23 kB of memory each
FIRST_RETRY = 0.5  # seconds until a child that ended is started again; doubled at each further end
LAST_RETRY = 60.0
STEADY = 60.0  # seconds of service after which an end counts as the first again
TERMINATION = 5.0  # seconds that a child has for ending when asked to, before it is killed
LAST_LINES = 8  # of a child's log: those that are shown when it ends by itself

_log = Logger()


class LocalServer(Service):
    """Runs llama.cpp's server while this service runs, and starts it again when it ends by itself.

    @param processes: starts the child; a reactor.
    @param clock: measures its times; the same reactor.
    @param model: the .gguf file to serve. The server calls the model by the file's name without its suffix.
    @param slots: generations at a time.
    @param make_key: makes a key for each child, known to nobody else.
    @param jitter: seconds to add to each wait, so that not everything that failed at once comes back at once.
    @param environ: the child's environment, but for the module search path, which is this process's own.
    """

    def __init__(
        self,
        *,
        processes: IReactorProcess,
        clock: IReactorTime,
        model: Path,
        slots: int,
        make_key: Callable[[], str],
        jitter: Callable[[], float],
        environ: Mapping[str, str],
    ):
        delay = backoffPolicy(FIRST_RETRY, LAST_RETRY, factor=2.0, jitter=jitter)
        self._run = _Run(processes, clock, model, slots, make_key, delay, environ)
        self._machine = _make_machine(self._run)

    def location(self) -> Location | None:
        """Where to find the server; None while it does not serve. Each start of the child changes it."""
        return self._run.location

    def startService(self) -> None:
        """Start the child. It serves as soon as `location` says where."""
        super().startService()  # type: ignore[no-untyped-call]
        self._machine.start()

    def stopService(self) -> Deferred[None]:
        """End the child. The Deferred fires when there is none; it does not fail."""
        super().stopService()  # type: ignore[no-untyped-call]
        return self._machine.stop()


class _Lines:
    """Cuts what comes in pieces into lines."""

    def __init__(self) -> None:
        self._rest = b""

    def cut(self, piece: bytes) -> list[str]:
        *lines, rest = (self._rest + piece).split(b"\n")
        self._rest = rest[-2000:]  # the end is enough of a line that knows none
        return [line.decode("utf-8", "replace") for line in lines]


class _Child(ProcessProtocol):
    """One child, from its start to its end.

    @param ready: is called with this child and its port once it serves.
    @param ended: is called with this child and the reason once it is gone, and all that it said has been read.
    """

    transport: IProcessTransport

    def __init__(
        self,
        clock: IReactorTime,
        api_key: str,
        ready: "Callable[[_Child, int], None]",
        ended: "Callable[[_Child, Failure], None]",
    ):
        self.api_key = api_key
        self.started_at = clock.seconds()
        self.ready_at: float | None = None
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._clock = clock
        self._ready = ready
        self._ended = ended
        self._kill: IDelayedCall | None = None
        self._out = _Lines()
        self._err = _Lines()

    def outReceived(self, data: bytes) -> None:
        for line in self._out.cut(data):
            try:
                port = msgspec.json.decode(line, type=Ready).port
            except msgspec.DecodeError:  # what Python was made to say before our program began
                _log.debug("Local model server: {line}", line=line)
            else:
                self.ready_at = self._clock.seconds()
                self._ready(self, port)

    def errReceived(self, data: bytes) -> None:
        for line in self._err.cut(data):
            self.last_lines.append(line)
            _log.debug("Local model server: {line}", line=line)

    def terminate(self) -> None:
        """Ask it to end, and make it end if it does not."""
        self._signal("TERM")
        self._kill = self._clock.callLater(TERMINATION, self._signal, "KILL")

    def _signal(self, name: str) -> None:
        with suppress(ProcessExitedAlready):
            self.transport.signalProcess(name)

    def processEnded(self, reason: Failure) -> None:
        if self._kill is not None and self._kill.active():
            self._kill.cancel()
        self._ended(self, reason)


@dataclass
class _Run:
    """What the states below share: what was handed in, and what outlives one child."""

    processes: IReactorProcess
    clock: IReactorTime
    model: Path
    slots: int
    make_key: Callable[[], str]
    retry_delay: Callable[[int], float]
    environ: Mapping[str, str]

    location: Location | None = None
    failures: int = 0
    stopping: list[Deferred[None]] = field(default_factory=list)

    def spawn(self, child: _Child) -> None:
        """@raise OSError: there can't be another process now."""
        config = ServerConfig(
            model_path=str(self.model),
            model_name=self.model.stem,
            api_key=child.api_key,
            slots=self.slots,
            context_length=CONTEXT_LENGTH,
            parent_pid=os.getpid(),
        )
        # With -P and our own path, the child finds the modules that we run, and none in the working directory.
        arguments = [sys.executable, "-P", "-m", "ai_ticket.backend.llama_child"]
        environ = {**self.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
        transport = self.processes.spawnProcess(child, sys.executable, arguments, env=environ)
        transport.writeToChild(0, msgspec.json.encode(config) + b"\n")


class _Supervision(Protocol):
    """What can happen to the server."""

    def start(self) -> None:
        """It is wanted."""

    def stop(self) -> Deferred[None]:
        """It is not wanted any more. The Deferred fires when there is no child."""

    def ready(self, child: _Child, port: int) -> None:
        """The child serves."""

    def ended(self, child: _Child, reason: Failure) -> None:
        """The child is gone, or there never was one."""

    def retry(self) -> None:
        """The wait after a child's end is over."""


def _build() -> Callable[[_Run], _Supervision]:
    builder = TypeMachineBuilder(_Supervision, _Run)

    def spawn(machine: _Supervision, run: _Run) -> _Child:
        child = _Child(run.clock, run.make_key(), machine.ready, machine.ended)
        _log.info("Starting the local model server with {model}", model=run.model.name)
        try:
            run.spawn(child)
        except OSError:
            machine.ended(child, Failure())
        return child

    def serve(machine: _Supervision, run: _Run, child: _Child, port: int) -> _Child:
        run.location = Location(url=f"http://127.0.0.1:{port}", api_key=child.api_key)
        seconds = run.clock.seconds() - child.started_at
        _log.info("The local model server is ready after {seconds:.1f} s, on port {port}", seconds=seconds, port=port)
        return child

    def wait(machine: _Supervision, run: _Run, child: _Child, reason: Failure) -> IDelayedCall:
        run.location = None
        if child.ready_at is not None and run.clock.seconds() - child.ready_at >= STEADY:
            run.failures = 0
        delay = run.retry_delay(run.failures)
        run.failures += 1
        lines = " | ".join(child.last_lines) or "(none)"
        told = "The local model server {how}; it will be started again in {delay:.1f} s. Its last lines: {lines}"
        _log.error(told, how=_how(reason), delay=delay, lines=lines)
        return run.clock.callLater(delay, machine.retry)

    stopped = builder.state("stopped")
    starting = builder.state("starting", spawn)
    serving = builder.state("serving", serve)
    waiting = builder.state("waiting", wait)
    stopping = builder.state("stopping")
    restarting = builder.state("restarting")  # wanted again before the last child has gone

    stopped.upon(_Supervision.start).to(starting).returns(None)
    starting.upon(_Supervision.ready).to(serving).returns(None)
    starting.upon(_Supervision.ended).to(waiting).returns(None)
    serving.upon(_Supervision.ended).to(waiting).returns(None)
    waiting.upon(_Supervision.retry).to(starting).returns(None)
    stopping.upon(_Supervision.start).to(restarting).returns(None)
    for state in (starting, serving, waiting, restarting):
        state.upon(_Supervision.start).loop().returns(None)
    for state in (stopping, restarting):
        state.upon(_Supervision.ready).loop().returns(None)

    @stopped.upon(_Supervision.stop).loop()
    def nothing_to_stop(machine: _Supervision, run: _Run) -> Deferred[None]:
        return succeed(None)

    @waiting.upon(_Supervision.stop).to(stopped)
    def stop_waiting(machine: _Supervision, run: _Run, next_start: IDelayedCall) -> Deferred[None]:
        next_start.cancel()
        return succeed(None)

    @starting.upon(_Supervision.stop).to(stopping)
    @serving.upon(_Supervision.stop).to(stopping)
    def stop_child(machine: _Supervision, run: _Run, child: _Child) -> Deferred[None]:
        run.location = None
        child.terminate()
        return await_end(machine, run)

    @stopping.upon(_Supervision.stop).loop()
    @restarting.upon(_Supervision.stop).to(stopping)
    def await_end(machine: _Supervision, run: _Run) -> Deferred[None]:
        run.stopping.append(Deferred())
        return run.stopping[-1]

    @stopping.upon(_Supervision.ended).to(stopped)
    def child_gone(machine: _Supervision, run: _Run, child: _Child, reason: Failure) -> None:
        _log.info("The local model server has ended")
        waiters, run.stopping = run.stopping, []
        for waiter in waiters:
            waiter.callback(None)

    @restarting.upon(_Supervision.ended).to(stopped)
    def start_anew(machine: _Supervision, run: _Run, child: _Child, reason: Failure) -> None:
        machine.start()
        child_gone(machine, run, child, reason)

    return builder.build()


_make_machine = _build()


def _how(reason: Failure) -> str:
    """How a child ended, to follow its name."""
    error = reason.value
    if not isinstance(error, ProcessTerminated | ProcessDone):
        return f"could not be started ({error})"
    return f"ended with status {error.exitCode}" if error.signal is None else f"was ended by signal {error.signal}"
