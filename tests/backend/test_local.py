"""The bundled model server: its supervision on a clock of the test's own, and real children at the end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.interfaces import IReactorProcess
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs, formatEvent
from twisted.python.failure import Failure
from zope.interface import implementer

import ai_ticket
from ai_ticket.backend import llama_child, model
from ai_ticket.backend.llama_child import ServerConfig
from ai_ticket.backend.local import LocalServer, Location

ENVIRON = {"LD_LIBRARY_PATH": "/opt/lib"}
JITTER = 0.25


class Child:
    """A child that does nothing by itself: its transport, and what a test has it do."""

    def __init__(self, protocol: ProcessProtocol, arguments: list[str], environ: dict[str, str]):
        self.protocol = protocol
        self.arguments = arguments
        self.environ = environ
        self.stdin = b""
        self.signals: list[str] = []
        self.exited = False
        protocol.makeConnection(self)

    def writeToChild(self, descriptor: int, data: bytes) -> None:
        assert descriptor == 0
        self.stdin += data

    def signalProcess(self, name: str) -> None:
        if self.exited:
            raise ProcessExitedAlready
        self.signals.append(name)

    @property
    def config(self) -> ServerConfig:
        assert self.stdin.endswith(b"\n")
        return msgspec.json.decode(self.stdin, type=ServerConfig)

    def say(self, data: bytes) -> None:
        self.protocol.childDataReceived(1, data)

    def log(self, data: bytes) -> None:
        self.protocol.childDataReceived(2, data)

    def get_ready(self, port: int = 1234) -> None:
        self.say(b'{"port":%d}\n' % port)

    def end(self, status: int | None = None, signal: int | None = None) -> None:
        self.exited = True
        error = ProcessTerminated(status, signal) if status or signal else ProcessDone(0)
        self.protocol.processEnded(Failure(error))


@implementer(IReactorProcess)
class Processes:
    """Starts children of the kind above."""

    def __init__(self) -> None:
        self.children: list[Child] = []
        self.error: OSError | None = None

    def spawnProcess(
        self,
        processProtocol: Any,
        executable: Any,
        args: Any = (),
        env: Any = None,
        path: Any = None,
        uid: Any = None,
        gid: Any = None,
        usePTY: Any = False,
        childFDs: Any = None,
    ) -> Any:
        assert executable == args[0] == sys.executable
        if self.error is not None:
            raise self.error
        self.children.append(Child(processProtocol, args, env))
        return self.children[-1]

    @property
    def last(self) -> Child:
        return self.children[-1]


@pytest.fixture
def processes() -> Processes:
    return Processes()


@pytest.fixture
def clock() -> Iterator[Clock]:
    clock = Clock()
    clock.advance(1000.0)
    yield clock
    assert clock.getDelayedCalls() == []


@pytest.fixture
def server(processes: Processes, clock: Clock) -> Iterator[LocalServer]:
    """A service that was not yet started; ended after the test."""
    keys = (f"key-{number}" for number in range(1, 1000))
    server = LocalServer(
        processes=processes,
        clock=clock,
        model=Path("/models/Small-1B.Q4.gguf"),
        slots=3,
        make_key=lambda: next(keys),
        jitter=lambda: JITTER,
        environ=ENVIRON,
    )
    yield server
    stopped = server.stopService()
    if not stopped.called:
        processes.last.end(signal=signal.SIGTERM)
    assert fired(stopped)


def fired(deferred: "Deferred[None]") -> bool:
    """Whether it fired with None, the only thing that it may fire with."""
    return deferred.called and deferred.result is None


def restarts_after(seconds: float, clock: Clock, processes: Processes) -> bool:
    """Whether the next child is started when so much time has passed, and not before."""
    before = len(processes.children)
    clock.advance(seconds - 0.01)
    early = len(processes.children) - before
    clock.advance(0.02)
    return not early and len(processes.children) == before + 1


def test_nothing_is_started_before_the_service(server: LocalServer, processes: Processes) -> None:
    assert processes.children == []
    assert server.location() is None


def test_the_child_learns_from_its_stdin_what_to_serve(server: LocalServer, processes: Processes) -> None:
    server.startService()
    child = processes.last
    assert child.arguments[1:] == ["-P", "-m", "ai_ticket.backend.llama_child"]
    assert child.config == ServerConfig(
        model_path="/models/Small-1B.Q4.gguf",
        model_name="Small-1B.Q4",
        api_key="key-1",
        slots=3,
        context_length=8192,
        parent_pid=os.getpid(),
    )


def test_the_child_runs_our_modules_in_the_environment_it_is_given(server: LocalServer, processes: Processes) -> None:
    server.startService()
    path = processes.last.environ["PYTHONPATH"].split(os.pathsep)
    assert path == [os.path.abspath(folder) for folder in sys.path]
    assert processes.last.environ == {**ENVIRON, "PYTHONPATH": os.pathsep.join(path)}


def test_it_serves_where_the_child_says(server: LocalServer, processes: Processes, clock: Clock) -> None:
    server.startService()
    assert server.location() is None
    clock.advance(2.5)
    with capturedLogs() as logs:
        processes.last.say(b'{"po')
        assert server.location() is None
        processes.last.say(b'rt":4321}\n')
    assert server.location() == Location(url="http://127.0.0.1:4321", api_key="key-1")
    assert [formatEvent(event) for event in logs] == ["The local model server is ready after 2.5 s, on port 4321"]


def test_other_words_on_stdout_are_passed_over(server: LocalServer, processes: Processes) -> None:
    server.startService()
    processes.last.say(b'warning: \xff\n{"other": 1}\n')
    assert server.location() is None
    processes.last.get_ready()
    assert server.location() is not None


def test_the_key_is_not_shown() -> None:
    assert repr(Location(url="http://127.0.0.1:1", api_key="secret")) == "Location('http://127.0.0.1:1')"


def test_the_childs_log_is_for_debugging(server: LocalServer, processes: Processes) -> None:
    server.startService()
    with capturedLogs() as logs:
        processes.last.log(b"first\nsec")
        processes.last.log(b"ond\n")
    assert [formatEvent(event) for event in logs] == ["Local model server: first", "Local model server: second"]
    assert {event["log_level"] for event in logs} == {LogLevel.debug}


def test_a_child_that_dies_is_told_of_and_replaced(server: LocalServer, processes: Processes, clock: Clock) -> None:
    server.startService()
    processes.last.get_ready()
    processes.last.log(b"".join(b"line %d\n" % number for number in range(100)))
    with capturedLogs() as logs:
        processes.last.end(signal=9)
    assert server.location() is None
    assert logs[0]["log_level"] == LogLevel.error
    assert formatEvent(logs[0]) == (
        "The local model server was ended by signal 9; it will be started again in 0.8 s. "
        "Its last lines: line 92 | line 93 | line 94 | line 95 | line 96 | line 97 | line 98 | line 99"
    )
    assert restarts_after(0.75, clock, processes)
    processes.last.get_ready(port=5678)
    assert server.location() == Location(url="http://127.0.0.1:5678", api_key="key-2")


@pytest.mark.parametrize(("status", "words"), [(1, "ended with status 1"), (0, "ended with status 0")])
def test_a_child_that_ends_before_it_serves(
    status: int, words: str, server: LocalServer, processes: Processes, clock: Clock
) -> None:
    server.startService()
    processes.last.log(b"failed to load model\n")
    with capturedLogs() as logs:
        processes.last.end(status=status)
    assert f"The local model server {words}; it" in (formatEvent(logs[0]) or "")
    assert restarts_after(0.75, clock, processes)


def test_the_waits_grow_to_a_minute(server: LocalServer, processes: Processes, clock: Clock) -> None:
    server.startService()
    for wait in (0.5, 1, 2, 4, 8, 16, 32, 60, 60):
        processes.last.get_ready()
        clock.advance(59.0)
        processes.last.end(status=1)
        assert restarts_after(wait + JITTER, clock, processes)


def test_after_a_minute_of_service_the_waits_begin_anew(
    server: LocalServer, processes: Processes, clock: Clock
) -> None:
    server.startService()
    for wait in (0.5, 1, 2):
        processes.last.end(status=1)
        assert restarts_after(wait + JITTER, clock, processes)
    processes.last.get_ready()
    clock.advance(60.0)
    for wait in (0.5, 1):
        processes.last.end(status=1)
        assert restarts_after(wait + JITTER, clock, processes)


def test_a_long_start_is_no_service(server: LocalServer, processes: Processes, clock: Clock) -> None:
    server.startService()
    for wait in (0.5, 1):
        clock.advance(300.0)
        processes.last.end(status=1)
        assert restarts_after(wait + JITTER, clock, processes)


def test_a_process_that_cannot_be_started_is_tried_again(
    server: LocalServer, processes: Processes, clock: Clock
) -> None:
    processes.error = OSError(11, "Resource temporarily unavailable")
    with capturedLogs() as logs:
        server.startService()
    assert "could not be started ([Errno 11] Resource temporarily unavailable)" in (formatEvent(logs[-1]) or "")
    processes.error = None
    assert restarts_after(0.75, clock, processes)


def test_starting_twice_starts_one_child(server: LocalServer, processes: Processes) -> None:
    server.startService()
    server.startService()
    assert len(processes.children) == 1


@pytest.mark.parametrize("ready", [False, True])
def test_stopping_ends_the_child(ready: bool, server: LocalServer, processes: Processes, clock: Clock) -> None:
    """Also one that is still starting."""
    server.startService()
    if ready:
        processes.last.get_ready()
    stopped = server.stopService()
    assert server.location() is None
    assert processes.last.signals == ["TERM"]
    assert not fired(stopped)
    with capturedLogs() as logs:
        processes.last.end(signal=signal.SIGTERM)
    assert fired(stopped)
    assert [formatEvent(event) for event in logs] == ["The local model server has ended"]
    assert clock.getDelayedCalls() == []


def test_a_child_that_does_not_end_is_killed(server: LocalServer, processes: Processes, clock: Clock) -> None:
    server.startService()
    stopped = server.stopService()
    clock.advance(4.99)
    assert processes.last.signals == ["TERM"]
    clock.advance(0.01)
    assert processes.last.signals == ["TERM", "KILL"]
    assert not fired(stopped)
    processes.last.end(signal=signal.SIGKILL)
    assert fired(stopped)


def test_stopping_a_child_that_has_just_ended(server: LocalServer, processes: Processes, clock: Clock) -> None:
    """Its end is not yet known here."""
    server.startService()
    processes.last.exited = True
    stopped = server.stopService()
    clock.advance(5.0)
    processes.last.end(status=1)
    assert fired(stopped)
    assert len(processes.children) == 1


def test_a_child_that_gets_ready_while_it_is_stopped(server: LocalServer, processes: Processes) -> None:
    server.startService()
    server.stopService()
    processes.last.get_ready()
    assert server.location() is None


def test_stopping_between_two_children(server: LocalServer, processes: Processes, clock: Clock) -> None:
    server.startService()
    processes.last.end(status=1)
    assert fired(server.stopService())
    assert clock.getDelayedCalls() == []
    assert len(processes.children) == 1


def test_stopping_twice(server: LocalServer, processes: Processes) -> None:
    server.startService()
    first, second = server.stopService(), server.stopService()
    assert processes.last.signals == ["TERM"]
    assert not fired(first)
    assert not fired(second)
    processes.last.end(signal=signal.SIGTERM)
    assert fired(first)
    assert fired(second)
    assert fired(server.stopService())


def test_stopping_what_was_never_started(server: LocalServer) -> None:
    assert fired(server.stopService())


def test_starting_again(server: LocalServer, processes: Processes) -> None:
    server.startService()
    server.stopService()
    processes.last.end(signal=signal.SIGTERM)
    server.startService()
    assert len(processes.children) == 2
    processes.last.get_ready()
    assert server.location() == Location(url="http://127.0.0.1:1234", api_key="key-2")


def test_starting_again_before_the_last_child_has_gone(server: LocalServer, processes: Processes) -> None:
    """There are never two children; who waited for the first one's end is told of it."""
    server.startService()
    stopped = server.stopService()
    server.startService()
    assert len(processes.children) == 1
    processes.last.end(signal=signal.SIGTERM)
    assert fired(stopped)
    assert len(processes.children) == 2


def test_starting_again_and_then_not(server: LocalServer, processes: Processes) -> None:
    server.startService()
    first = server.stopService()
    server.startService()
    second = server.stopService()
    processes.last.end(signal=signal.SIGTERM)
    assert fired(first)
    assert fired(second)
    assert len(processes.children) == 1


def test_how_the_child_sets_up_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """A private server: on the loopback with a key, under the model's name, its context split over the slots."""

    def params() -> SimpleNamespace:
        return SimpleNamespace(model=SimpleNamespace(), cpuparams=SimpleNamespace())

    library = SimpleNamespace(CommonParams=params, Server=lambda params: params)
    monkeypatch.setitem(sys.modules, "xllamacpp", library)
    config = ServerConfig(
        model_path="/m/a.gguf", model_name="a", api_key="k", slots=3, context_length=1000, parent_pid=1
    )
    found = vars(llama_child._serve(config))
    assert found.pop("model").path == "/m/a.gguf"
    assert 1 <= found.pop("cpuparams").n_threads <= 8
    assert found == {
        "hostnames": ["127.0.0.1"],
        "port": 0,
        "api_keys": ["k"],
        "model_alias": {"a"},
        "n_parallel": 3,
        "n_batch": 128,
        "n_ubatch": 128,
        "n_ctx": 3000,
        "cache_ram_mib": 0,
        "cache_idle_slots": False,
        "ui": False,
        "endpoint_slots": False,
        "endpoint_metrics": False,
        "verbosity": 2,
    }


PARENT = """
import os, random, secrets, sys
from pathlib import Path
from twisted.internet import reactor
from ai_ticket.backend.local import LocalServer

class Processes:
    def spawnProcess(self, *args, **kwargs):
        process = reactor.spawnProcess(*args, **kwargs)
        print("child", process.pid, flush=True)
        return process

server = LocalServer(
    processes=Processes(), clock=reactor, model=Path(sys.argv[1]), slots=1,
    make_key=lambda: secrets.token_urlsafe(32), jitter=random.random, environ=os.environ,
)

def look(told):
    location = server.location()
    if location != told and location is not None:
        print("serves", location.url, location.api_key, flush=True)
    reactor.callLater(0.01, look, location)

look(None)
server.startService()
reactor.addSystemEventTrigger("before", "shutdown", server.stopService)
reactor.run()
"""


class Parent:
    """A process that runs a `LocalServer` on a real reactor, as the daemon does."""

    def __init__(self, model_path: Path):
        package = str(Path(ai_ticket.__file__).parents[1])
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(model_path)],
            env={**os.environ, "PYTHONPATH": package},
            stdout=subprocess.PIPE,
            text=True,
        )
        self.children: list[int] = []

    def expect(self, word: str) -> list[str]:
        """What follows this word on the next line that begins with it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found, *rest = line.split()
            if found == "child":
                self.children.append(int(rest[0]))
            if found == word:
                return rest
        raise AssertionError(f"the parent ended, status {self.process.wait()}, without saying {word!r}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def alive(pid: int) -> bool:
    """Whether this process runs; one that only waits to be reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Whether it comes true in this time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def post(url: str, key: str, **fields: Any) -> Any:
    body = json.dumps({"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0, **fields}).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", body, headers)
    return urllib.request.urlopen(request, timeout=60)


def ask(url: str, key: str, **fields: Any) -> dict[str, Any]:
    with post(url, key, **fields) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def stream(url: str, key: str) -> Any:
    """An answer that has begun and will go on for a minute or more."""
    response = post(url, key, stream=True, max_tokens=4000, ignore_eos=True)
    assert response.readline().startswith(b"data: ")
    return response


@pytest.fixture
def model_path() -> Path:
    """The bundled model; the tests that need it are skipped where it can't be used."""
    if not sys.platform.startswith("linux"):
        pytest.skip("looks at processes in /proc")
    problem = model.problem(None)
    if problem is not None:
        pytest.skip(problem)
    return model.bundled_model_path()


@pytest.fixture
def start(model_path: Path) -> Iterator[Callable[[], Parent]]:
    """Starts parents, which end with the test, or after two minutes at the latest."""
    parents: list[Parent] = []
    timers: list[threading.Timer] = []

    def start() -> Parent:
        parent = Parent(model_path)
        parents.append(parent)
        timers.append(threading.Timer(120.0, parent.process.kill))
        timers[-1].start()
        return parent

    yield start
    for timer in timers:
        timer.cancel()
    for parent in parents:
        parent.kill()
        assert parent.process.stdout is not None
        parent.process.stdout.close()
    children = [pid for parent in parents for pid in parent.children]
    within(2.0, lambda: not any(map(alive, children)))
    left = [pid for pid in children if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


@pytest.mark.e2e
def test_a_real_child_answers_and_comes_back_when_killed(start: Callable[[], Parent]) -> None:
    parent = start()
    url, key = parent.expect("serves")
    answer = ask(url, key)
    assert answer["model"] == "SmolLM2-135M-Instruct.Q4_1"
    assert "Paris" in answer["choices"][0]["text"]
    with pytest.raises(urllib.error.HTTPError, match="401"):
        ask(url, "another key")

    os.kill(parent.children[-1], signal.SIGKILL)
    url, new_key = parent.expect("serves")
    assert new_key != key
    assert ask(url, new_key, max_tokens=1)["usage"]["completion_tokens"] == 1


@pytest.mark.e2e
def test_a_real_child_ends_in_order_with_its_parent(start: Callable[[], Parent]) -> None:
    """An interrupt from the terminal, which goes to both, is left to the parent."""
    parent = start()
    parent.expect("serves")
    os.kill(parent.children[-1], signal.SIGINT)
    assert not within(0.2, lambda: not alive(parent.children[-1]))
    parent.process.send_signal(signal.SIGINT)
    assert parent.process.wait(4.0) == 0
    assert not alive(parent.children[-1])


@pytest.mark.e2e
def test_no_real_child_is_left_when_the_parent_is_killed(start: Callable[[], Parent]) -> None:
    parent = start()
    url, key = parent.expect("serves")
    answering = stream(url, key)
    parent.kill()
    assert within(1.0, lambda: not alive(parent.children[-1]))
    answering.close()


@pytest.mark.e2e
@pytest.mark.parametrize("delay", [0.0, 0.2])
def test_no_real_child_is_left_when_the_parent_is_killed_during_the_load(
    delay: float, start: Callable[[], Parent], model_path: Path
) -> None:
    parent = start()
    pid = int(parent.expect("child")[0])
    assert within(10.0, lambda: str(model_path.name) in Path(f"/proc/{pid}/maps").read_text())
    time.sleep(delay)
    parent.kill()
    assert within(1.0, lambda: not alive(pid))


@pytest.mark.e2e
def test_no_real_child_is_left_even_where_it_cannot_look_at_its_stdin(start: Callable[[], Parent]) -> None:
    """So it is while a model is loaded, for a large one over minutes."""
    parent = start()
    pid = int(parent.expect("child")[0])
    parent.expect("serves")
    os.kill(pid, signal.SIGSTOP)
    parent.kill()
    assert within(1.0, lambda: not alive(pid))


def child_process(**options: Any) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "ai_ticket.backend.llama_child"]
    return subprocess.Popen(command, cwd=Path(ai_ticket.__file__).parents[1], stdin=subprocess.PIPE, **options)


def config_line(model_path: Path, parent_pid: int) -> bytes:
    config = ServerConfig(
        model_path=str(model_path), model_name="m", api_key="k", slots=1, context_length=512, parent_pid=parent_pid
    )
    return msgspec.json.encode(config) + b"\n"


@pytest.mark.e2e
def test_a_real_child_ends_at_the_end_of_its_stdin(model_path: Path) -> None:
    child = child_process(stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(config_line(model_path, os.getpid()))
    child.stdin.flush()
    assert json.loads(child.stdout.readline())["port"] > 0
    child.stdin.close()
    assert child.wait(1.0) == 0
    child.stdout.close()


@pytest.mark.e2e
def test_a_real_child_says_why_it_cannot_serve(model_path: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))
    child = child_process(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = child.communicate(config_line(bad, os.getpid()), timeout=30)
    assert child.returncode == 1
    assert out == b""
    assert b"bad GGUF version" in err
    # Its own log comes from a thread of llama.cpp's, so a line of that may still come behind ours.
    assert any(line.startswith(b"llama.cpp's server did not start: ") for line in err.splitlines())


@pytest.mark.parametrize("line", [b"", b'{"model_path":', config_line(Path("none.gguf"), parent_pid=1 << 30)])
def test_a_child_without_its_parent_ends_at_once(line: bytes) -> None:
    child = child_process(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.communicate(line, timeout=10) == (b"", b"")
    assert child.returncode == 0
