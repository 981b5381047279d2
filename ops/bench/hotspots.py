"""Where the daemon's CPU goes: its costliest functions by their own time. `python ops/bench/hotspots.py [CASE]`.

It notes what it is at by the clock of its own CPU (observed.tac), so neither other processes nor a profiler's calls
count. What a function does in C, the kernel's part included, is its own.
"""

import argparse
import json
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cases import CASES, Effort, measure, warm_up
from peers import AI_TICKET
from processes import OBSERVED, canned, start_ai_ticket, telemetry_on

MOST = 25
SECONDS = 20.0

Noted = tuple[str, int, str, int]
"""File, line and name of a function, and how often it was at it."""


def shown(file: str, line: int, name: str) -> str:
    """A function's place, without the folders that only this machine has."""
    parts = Path(file).parts
    for package in ("site-packages", "ai_ticket"):
        if package in parts:
            place = len(parts) - 1 - parts[::-1].index(package)
            file = str(Path(*parts[place + (package == "site-packages") :]))
            break
    else:
        file = f"python/{Path(file).name}"
    return f"{file}:{line} {name}"


def report(noted: Sequence[Noted], cpu: float) -> str:
    """Lines of share and microseconds, of `cpu` seconds for each request or token, and the function."""
    total = sum(count for *_, count in noted)
    lines = [f"{cpu * 1e6:.0f} us of CPU for each, {total} notes"]
    for file, line, name, count in sorted(noted, key=lambda one: -one[3])[:MOST]:
        share = count / total
        lines.append(f"{share:6.1%} {share * cpu * 1e6:7.1f} us  {shown(file, line, name)}")
    by_room: dict[str, int] = {}
    for file, line, name, count in noted:
        first = "/".join(shown(file, line, name).partition(":")[0].split("/")[:2])
        by_room[first] = by_room.get(first, 0) + count
    lines.append("by package:")
    for room, count in sorted(by_room.items(), key=lambda one: -one[1])[:15]:
        lines.append(f"{count / total:6.1%} {count / total * cpu * 1e6:7.1f} us  {room}")
    return "\n".join(lines)


def main() -> None:
    """Measure the case, and print where the time went."""
    cases = {case.name: case for case in CASES}
    parser = argparse.ArgumentParser(description="Where the daemon's CPU goes under a case of the benchmark.")
    parser.add_argument(
        "case", nargs="?", default="answers", choices=cases, metavar="CASE", help=f"of {', '.join(cases)} (%(default)s)"
    )
    case = replace(cases[parser.parse_args().case], passes=5)
    with canned(case.backend) as backend, canned("collector") as collector, tempfile.TemporaryDirectory() as folder:
        url = f"http://127.0.0.1:{backend.port}"
        settings = telemetry_on(collector.port) | dict(case.settings)
        running = start_ai_ticket(Path(folder), url, settings, tls=case.tls, arguments=OBSERVED)
        profile = Path(folder, "profile")
        try:
            warm_up(case, AI_TICKET, running.target)
            running.process.send_signal(signal.SIGUSR1)
            found = measure(case, AI_TICKET, running.target, Effort(busy=SECONDS, alone=0.0))
            running.process.send_signal(signal.SIGUSR1)
            while not profile.exists():
                time.sleep(0.05)
            print(
                f"{case.title}, {sum(found.errors.values())} errors:",
                report(json.loads(profile.read_text()), found.cpu),
            )
        finally:
            running.stop()


if __name__ == "__main__":
    main()
