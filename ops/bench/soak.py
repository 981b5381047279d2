"""An hour's worth of mixed load in less: does the daemon keep what it no longer needs? `python ops/bench/soak.py`.

At least 500,000 requests with answers, streams, errors of callers and of model servers, and callers who hang up. The
daemon's memory after a warm-up may grow by less than 5 %; its open files and delayed calls are to be back at the end.
Exit status 1 where they are not. `--requests 20000` shows that it works.
"""

import argparse
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import wire
from job import Call, Job, Outcome, finish, start
from processes import OBSERVED, Running, canned, open_files, resident_bytes, start_ai_ticket, telemetry_on

GROWTH = 1.05
CALLERS = 32
PIECE_SECONDS = 20.0
SETTLING_SECONDS = 12.0
"""What is left of kept connections and their timers is gone by then, `KEEPALIVE_TIMEOUT_SECONDS` being 2."""

SETTINGS = {
    "RATE_LIMIT_REQUESTS": "1000000",
    "RATE_LIMIT_WINDOW_SECONDS": "5",
    "KOBOLDCPP_IDLE_TIMEOUT_SECONDS": "3",
    "KEEPALIVE_TIMEOUT_SECONDS": "2",
    "MAX_CONCURRENCY": "24",
    "QUEUE_LIMIT": "64",
}
BROKEN = [200, 502, 503, 504]
"""A server that fails opens its circuit: then the next event is refused for it."""


@dataclass
class Looked:
    """What the daemon has: bytes resident, open files, delayed calls."""

    memory: int
    files: int
    delayed: int


def calls(keep: bool) -> list[Call]:
    """The mixture. A server that is busy is left alone for a second, by all: of that there is little."""

    def event(chance: float, stream: bool = False, **options: object) -> Call:
        order = wire.Order(**{name: options.pop(name) for name in ("tokens", "pace", "size", "do") if name in options})  # type: ignore[arg-type]
        sent = wire.request("/event", wire.event_body(order, stream), keep).decode("latin-1")
        return Call(sent, chance=chance, tokens=order.tokens, **{"status": BROKEN, **options})  # type: ignore[arg-type]

    def raw(chance: float, status: int, path: str, body: bytes) -> Call:
        return Call(wire.request(path, body, keep).decode("latin-1"), [status], None, chance=chance)

    good = wire.event_body(wire.Order(size=200), False)
    return [
        event(60, size=1024),
        event(12, size=1024, stream=True),
        event(3, size=65536),
        event(3, stream=True, tokens=20, pace=100),
        event(4, stream=True, tokens=50, pace=100, hang_up=0.05),
        event(2, hang_up=0.001),
        event(3, do="refuse"),
        event(0.3, do="fail"),
        event(0.02, do="busy"),
        event(0.3, do="cut", text=None),
        event(0.02, do="stall", text=None),
        event(0.3, stream=True, do="cut", text=None),
        raw(3, 400, "/event", b"{"),
        raw(2, 422, "/event", b'{"content":5}'),
        raw(2, 404, "/nowhere", good),
        Call(raw(1, 401, "/event", good).request.replace("bench", "wrong", 1), [401, 429], None, chance=1),
    ]


def look(running: Running, folder: Path) -> Looked:
    """What the daemon has now; it writes its delayed calls down when asked (observed.tac)."""
    told = folder / "delayed"
    told.unlink(missing_ok=True)
    running.process.send_signal(signal.SIGUSR2)
    while not (told.exists() and told.read_text().endswith("\n")):
        time.sleep(0.05)
    pid = running.target.pid
    return Looked(resident_bytes(pid), open_files(pid), int(told.read_text()))


def piece(port: int, seconds: float) -> Outcome:
    """Some of the load, by callers who keep their connections and by some who do not."""
    kept = start(Job(port, calls(True), CALLERS, seconds))
    other = start(Job(port, calls(False), CALLERS // 4, seconds, keep=False))
    outcome = finish(kept)
    outcome.add(finish(other))
    return outcome


def show(what: str, looked: Looked) -> None:
    """A line of the report."""
    print(
        f"{what:24} RSS {looked.memory / 1e6:6.1f} MB, {looked.files} open files, {looked.delayed} delayed calls",
        flush=True,
    )


def main() -> None:
    """Load, and look before and after."""
    parser = argparse.ArgumentParser("python ops/bench/soak.py", description="Does memory come back after mixed load?")
    parser.add_argument("--requests", type=int, default=500_000, help="that are made at the least (%(default)s)")
    wanted = parser.parse_args().requests
    with canned("llama.cpp") as backend, canned("collector") as collector, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        url = f"http://127.0.0.1:{backend.port}"
        running = start_ai_ticket(folder, url, telemetry_on(collector.port) | SETTINGS, arguments=OBSERVED)
        try:
            port = running.target.port
            outcome = Outcome()
            seconds = min(PIECE_SECONDS, wanted / 5000)
            while outcome.good + outcome.hung_up < wanted / 10:
                outcome.add(piece(port, seconds))
            time.sleep(SETTLING_SECONDS)
            show("after the warm-up", before := look(running, folder))
            while outcome.good + outcome.hung_up < wanted:
                outcome.add(piece(port, seconds))
                print(f"{outcome.good + outcome.hung_up:,} requests", end="\r", file=sys.stderr, flush=True)
            time.sleep(SETTLING_SECONDS)
            show(f"after {outcome.good + outcome.hung_up:,}", after := look(running, folder))
        finally:
            running.stop()
    print(
        f"{outcome.good:,} answered as they should be, {outcome.hung_up:,} hung up; errors: {outcome.errors or 'none'}"
    )
    growth = after.memory / before.memory
    kept = growth >= GROWTH or after.files > before.files or after.delayed > before.delayed
    print(f"memory grew {growth - 1:+.1%}: {'NOT as it should be' if kept or outcome.errors else 'as it should be'}")
    sys.exit(bool(kept or outcome.errors))


if __name__ == "__main__":
    main()
