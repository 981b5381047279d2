"""Slow callers by the thousand, of three kinds: what honest ones notice, and what is left of the slow ones.

`python ops/bench/slow_clients.py [--count 5000] [--addresses 8]` on Linux, with the daemon installed, or importable by
PYTHONPATH. Slow heads and bodies send a byte every `DRIP_SECONDS`; slow readers ask for large answers and take nothing.
Each kind comes from so many addresses of the loopback, so that the limit of connections per caller does not hold them
off; then, with `--addresses 1`, so that it does. Deadlines are set short, or it would take minutes.

Told are the p99 of honest callers, quiet and under attack, in turns; how long after its deadline the last slow socket
was gone; and memory and descriptors before and after. On a machine that others use too only the ratios mean something.
"""

import argparse
import asyncio
import itertools
import math
import select
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Event, Process, Queue
from multiprocessing.synchronize import Event as Flag
from statistics import median, quantiles
from typing import NamedTuple

from attacked import TOKEN, Daemon, attacked

from ai_ticket.overload import MEASURE_SECONDS, RELEASE_MEASURES

HEADER_SECONDS, BODY_SECONDS, IDLE_SECONDS = 8, 10, 10
GRACE_SECONDS = 5.0
DRIP_SECONDS = 2.0
RATE = 500
"""Slow callers that come in a second."""

TURNS = 250
"""In a second: some callers come in each, and some of those who are there drip."""

DRIP_TURNS = int(DRIP_SECONDS * TURNS)

HONEST_CALLERS = 4
HONEST_PAUSE = 0.02
QUIET_SECONDS = 6.0

HEAD = f"POST /event HTTP/1.1\r\nHost: x\r\nX-API-Key: {TOKEN}\r\nContent-Type: application/json\r\n".encode()
HONEST_BODY = b'{"content":"What is the capital of France?"}'
HONEST = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(HONEST_BODY), HONEST_BODY)
METRICS = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"

# What a slow caller of each kind sends first, and whether it then drips; and after how many seconds it must be gone.
KINDS: dict[str, tuple[bytes, bool, float]] = {
    "headers": (b"POST /event HTTP/1.1\r\nHost: x\r\n", True, HEADER_SECONDS),
    "bodies": (HEAD + b'Content-Length: 100000\r\n\r\n{"content":"', True, BODY_SECONDS),
    "readers": (METRICS, False, IDLE_SECONDS),
}


class Slow:
    """A slow caller, who listens to nothing."""

    def __init__(self, port: int, address: str, first: bytes, *, reads: bool) -> None:
        self._first = first
        self.socket = socket.socket()
        self.socket.setblocking(False)
        if not reads:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.bind((address, 0))
        self.socket.connect_ex(("127.0.0.1", port))

    def begin(self) -> None:
        """Connected: say something."""
        self._write(self._first)

    def drip(self) -> None:
        """One more byte."""
        self._write(b"a")

    def _write(self, data: bytes) -> None:
        with suppress(OSError):  # the daemon has closed it, which epoll tells
            self.socket.send(data)


class Attack(NamedTuple):
    """What became of slow callers: how many there were at the most, when the last came, and when the last was cut.

    `gone` is infinite where some never were.
    """

    held: int
    opened: float
    gone: float


def attack(port: int, kind: str, count: int, addresses: int, over: Flag, told: "Queue[Attack]") -> None:  # noqa: PLR0917
    """Open so many connections, and keep them until the daemon has closed them all, or it is over.

    By bare system calls, in a process of its own: it shares the machine with the daemon and the honest callers, and
    what its own work takes of the processor would be blamed on the daemon.
    """
    first, drips, _ = KINDS[kind]
    callers: list[Slow] = []
    connecting: list[Slow] = []
    there: dict[int, Slow] = {}
    closed = select.epoll()
    held, opened, gone = 0, 0.0, 0.0
    for turn in itertools.count():
        for caller in connecting:
            caller.begin()
            closed.register(caller.socket, select.EPOLLRDHUP)
            there[caller.socket.fileno()] = caller
        held = max(held, len(there))
        connecting = [
            Slow(port, f"127.0.1.{1 + number % addresses}", first, reads=drips)
            for number in range(len(callers), min(len(callers) + RATE // TURNS, count))
        ]
        callers += connecting
        if connecting:
            opened = time.monotonic()
        elif not there:
            break
        for descriptor, _ in closed.poll(0):
            there.pop(descriptor).socket.close()
            gone = time.monotonic()
        if drips:
            for caller in callers[turn % DRIP_TURNS : len(callers) - len(connecting) : DRIP_TURNS]:
                caller.drip()
        if over.wait(1 / TURNS):
            break
    told.put(Attack(held, opened, math.inf if there else gone))


async def honest(port: int, until: Callable[[], bool]) -> tuple[list[float], int]:
    """How long each call took, of some callers who each call every now and then; and how many failed."""
    times: list[float] = []
    failed = 0

    async def call() -> None:
        nonlocal failed
        while not until():
            begun = time.monotonic()
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=("127.0.2.1", 0))
                writer.write(HONEST)
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
                failed += not head.startswith(b"HTTP/1.1 200 ")
                writer.close()
            except (OSError, TimeoutError, asyncio.IncompleteReadError):
                failed += 1
            times.append(time.monotonic() - begun)
            await asyncio.sleep(HONEST_PAUSE)

    await asyncio.gather(*(call() for _ in range(HONEST_CALLERS)))
    return times, failed


def p99(times: list[float]) -> float:
    """In milliseconds."""
    return quantiles(times, n=100)[98] * 1000


def measure(daemon: Daemon, seconds: float) -> tuple[float, float, int]:
    """Median and p99 of honest callers for so long, and how many calls failed."""
    end = time.monotonic() + seconds
    return measure_until(daemon, lambda: time.monotonic() > end)


def measure_until(daemon: Daemon, over: Callable[[], bool]) -> tuple[float, float, int]:
    """The same, until it is over."""
    times, failed = asyncio.run(honest(daemon.plain, over))
    return median(times) * 1000, p99(times), failed


def run(daemon: Daemon, kind: str, count: int, addresses: int) -> bool:
    """One kind of slow callers; whether all is as it should be."""
    deadline = KINDS[kind][2]
    measure(daemon, 2.0)
    memory, descriptors = daemon.memory, daemon.descriptors
    quiet = measure(daemon, QUIET_SECONDS)
    over, told = Event(), Queue()  # type: ignore[var-annotated]
    process = Process(target=attack, args=(daemon.plain, kind, count, addresses, over, told))
    process.start()
    patience = time.monotonic() + count / RATE + deadline + 60
    under = measure_until(daemon, lambda: time.monotonic() > patience or not told.empty())
    over.set()
    slow = told.get(timeout=10.0)
    process.join()
    latest = slow.gone - slow.opened - deadline
    time.sleep(3.0)
    again = measure(daemon, QUIET_SECONDS)
    time.sleep(3.0)
    print(
        f"{kind:8} {slow.held:5} held from {addresses} addresses: p99 quiet {quiet[1]:.1f} and {again[1]:.1f} ms, "
        f"attacked {under[1]:.1f} ms ({under[1] / max(quiet[1], again[1]):.2f}); "
        f"median {quiet[0]:.1f}, {under[0]:.1f} ms; failed {under[2]}; the last gone {latest:+.1f} s after its "
        f"deadline; memory {memory} -> {daemon.memory} KiB, descriptors {descriptors} -> {daemon.descriptors}",
        flush=True,
    )
    return latest <= GRACE_SECONDS and not under[2] and daemon.descriptors <= descriptors + HONEST_CALLERS


def main() -> None:
    """Print a line for each kind, and fail if a slow caller was kept, or an honest one not served."""
    parser = argparse.ArgumentParser(description="Slow callers by the thousand.")
    parser.add_argument("--count", type=int, default=5000, help="slow callers of each kind (%(default)s)")
    parser.add_argument("--addresses", type=int, default=8, help="that they come from (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="how often each kind comes (%(default)s)")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; all by default")
    options = parser.parse_args()
    unknown = set(options.kinds) - set(KINDS)
    if unknown:
        parser.error(f"no such kind: {', '.join(sorted(unknown))}")
    settings = {
        "HEADER_TIMEOUT_SECONDS": str(HEADER_SECONDS),
        "BODY_TIMEOUT_SECONDS": str(BODY_SECONDS),
        "KOBOLDCPP_IDLE_TIMEOUT_SECONDS": str(IDLE_SECONDS),
        "KEEPALIVE_TIMEOUT_SECONDS": "10",
        "LOG_LEVEL": "WARN",
    }
    fine = True
    with attacked(settings) as daemon:
        measure(daemon, QUIET_SECONDS)
        memory = daemon.memory
        for _ in range(options.rounds):
            for kind in options.kinds or KINDS:
                fine = run(daemon, kind, options.count, options.addresses) and fine
        late = max((tick.late for tick in daemon.ticks), default=0.0) * 1000
        time.sleep(RELEASE_MEASURES * MEASURE_SECONDS + 5.0)  # by then it has given back what it has freed
        print(f"the latest tick: {late:.0f} ms; memory at first {memory} KiB, a minute later {daemon.memory} KiB")
        if "Traceback" in daemon.log or daemon.process.poll() is not None:
            sys.exit(daemon.log[-3000:])
    sys.exit(not fine)


if __name__ == "__main__":
    main()
