"""What systemd is told, on sockets of its kind; and the sockets that it passes."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from logged import logged
from twisted.internet.task import Clock

from ai_ticket import systemd as module
from ai_ticket.systemd import PassedSocketError, Systemd, passed_sockets


class Manager:
    """systemd's end."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(address)
        self.clock = Clock()

    def systemd(self, address: str, **environ: str) -> Systemd:
        return Systemd({"NOTIFY_SOCKET": address, **environ}, self.clock)

    def heard(self) -> list[list[str]]:
        found = []
        while True:
            try:
                found.append(self.socket.recv(4096).decode().split("\n"))
            except BlockingIOError:
                return found


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "notify")


@pytest.fixture
def manager(path: str) -> Iterator[Manager]:
    found = Manager(path)
    yield found
    found.socket.close()
    assert not found.clock.getDelayedCalls()


def test_a_life(manager: Manager, path: str) -> None:
    systemd = manager.systemd(path)
    systemd.ready("serving")
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    systemd.reloading()
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    systemd.ready("serving")
    systemd.stopping("3 left", 12.5)
    systemd.status("2 left")
    systemd.stop()
    ready, reloading, again, stopping, status = manager.heard()
    assert ready == again == ["READY=1", "STATUS=serving"]
    assert reloading[0] == "RELOADING=1"
    name, _, microseconds = reloading[1].partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(microseconds) <= after
    assert stopping == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=42500000", "STATUS=3 left"]
    assert status == ["STATUS=2 left"]


def test_a_reload_that_ends_while_the_service_stops_makes_it_not_ready_again(manager: Manager, path: str) -> None:
    systemd = manager.systemd(path)
    systemd.reloading()
    systemd.stopping("", 0)
    systemd.ready("serving")
    systemd.reloading()
    systemd.stop()
    assert [lines[0] for lines in manager.heard()] == ["RELOADING=1", "STOPPING=1"]


def test_an_abstract_name() -> None:
    name = f"ai-ticket-test-{os.getpid()}"
    manager = Manager("\0" + name)
    systemd = manager.systemd("@" + name)
    systemd.status("x")
    systemd.stop()
    assert manager.heard() == [["STATUS=x"]]
    manager.socket.close()


def test_the_watchdog_is_not_fed_while_a_worker_hangs(manager: Manager, path: str) -> None:
    well = True
    environ = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "30000000"}
    systemd = Systemd(environ, manager.clock, well=lambda: well)
    systemd.ready("serving")
    manager.heard()
    well = False
    manager.clock.advance(15)
    assert manager.heard() == []
    well = True
    manager.clock.advance(15)
    assert manager.heard() == [["WATCHDOG=1"]]
    systemd.stop()


@pytest.mark.parametrize("address", ["", "vsock:2:1234"])
def test_nobody_to_tell(address: str) -> None:
    clock = Clock()
    systemd = Systemd({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"}, clock)
    systemd.ready("serving")
    systemd.stopping("", 0)
    assert not clock.getDelayedCalls()
    systemd.stop()


def test_a_manager_that_is_gone_is_told_of_in_the_log(path: str) -> None:
    systemd = Systemd({"NOTIFY_SOCKET": path}, Clock())
    with logged() as lines:
        systemd.status("x")
    systemd.stop()
    assert lines == ["warn: systemd can't be told how the service is: No such file or directory"]


def test_a_busy_manager_is_not_waited_for_and_told_all_later(manager: Manager, path: str) -> None:
    crowd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    with crowd, pytest.raises(BlockingIOError):
        while True:
            crowd.sendto(b"x", path)
    systemd = manager.systemd(path)
    systemd.ready("serving")
    systemd.status("still")
    manager.clock.advance(module.RETRY_SECONDS)
    manager.heard()
    manager.clock.advance(module.RETRY_SECONDS)
    assert manager.heard() == [["READY=1", "STATUS=serving"], ["STATUS=still"]]
    systemd.stop()


class TestWatchdog:
    def test_it_is_fed_twice_as_often_as_it_must_be(self, manager: Manager, path: str) -> None:
        systemd = manager.systemd(path, WATCHDOG_USEC="30000000", WATCHDOG_PID=str(os.getpid()))
        manager.clock.advance(100)
        assert manager.heard() == []
        systemd.ready("serving")
        assert [lines[0] for lines in manager.heard()] == ["READY=1", "WATCHDOG=1"]
        systemd.ready("serving")
        manager.clock.pump([1] * 45)
        assert [lines[0] for lines in manager.heard()] == ["READY=1"] + ["WATCHDOG=1"] * 3
        systemd.stopping("", 0)
        manager.clock.advance(15)
        assert [lines[0] for lines in manager.heard()] == ["STOPPING=1", "WATCHDOG=1"]
        systemd.stop()

    @pytest.mark.parametrize(
        "environ", [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "9", "WATCHDOG_PID": "1"}]
    )
    def test_none_is_set_for_us(self, manager: Manager, path: str, environ: dict[str, str]) -> None:
        systemd = manager.systemd(path, **environ)
        systemd.ready("serving")
        assert len(manager.heard()) == 1
        assert not manager.clock.getDelayedCalls()
        systemd.stop()


NAMES = {"https", "http", "metrics"}


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, list[socket.socket]]]]:
    """Passes sockets as systemd does, from some file descriptor on instead of 3."""
    first = 900
    found: list[socket.socket] = []
    monkeypatch.setattr(module, "FIRST_PASSED", first)

    def passed(names: str, *sockets: socket.socket, pid: int | None = None) -> dict[str, list[socket.socket]]:
        for number, each in enumerate(sockets, first):
            os.dup2(each.fileno(), number)
            each.close()
        environ = {"LISTEN_PID": str(pid or os.getpid()), "LISTEN_FDS": str(len(sockets)), "LISTEN_FDNAMES": names}
        taken = passed_sockets(environ, NAMES)
        found.extend(each for several in taken.values() for each in several)
        return taken

    yield passed
    for each in found:
        each.close()
    for number in range(first, first + 3):
        try:
            os.close(number)
        except OSError:
            continue


def server(family: socket.AddressFamily = socket.AF_INET) -> socket.socket:
    return socket.create_server(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), family=family)


def test_passed_sockets_by_their_names(passing: Callable[..., dict[str, list[socket.socket]]]) -> None:
    """A unit with two addresses for one endpoint gives both the same name."""
    found = passing("https:metrics:https", server(), server(), server(socket.AF_INET6))
    assert {name: [each.family for each in several] for name, several in found.items()} == {
        "https": [socket.AF_INET, socket.AF_INET6],
        "metrics": [socket.AF_INET],
    }
    for several in found.values():
        for each in several:
            assert not each.getblocking()
            assert not each.get_inheritable()


def test_sockets_for_another_process(passing: Callable[..., dict[str, list[socket.socket]]]) -> None:
    assert passing("https", server(), pid=1) == {}
    assert passed_sockets({}, NAMES) == {}


@pytest.mark.parametrize(
    ("names", "make", "reason"),
    [
        (
            "ai-ticket.socket",
            server,
            "named 'ai-ticket.socket': FileDescriptorName= must be one of http, https, metrics",
        ),
        ("", server, "named ''"),
        ("https", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM), "does not listen on TCP"),
        ("https", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM), "does not listen on TCP"),
    ],
)
def test_what_is_no_endpoint(
    passing: Callable[..., dict[str, list[socket.socket]]],
    names: str,
    make: Callable[[], socket.socket],
    reason: str,
) -> None:
    with pytest.raises(PassedSocketError, match=reason.replace("(", r"\(")):
        passing(names, make())
