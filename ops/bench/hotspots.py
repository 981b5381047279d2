"""Where the daemon's CPU goes: its costliest functions by their own time. `python ops/bench/hotspots.py [CASE]`.

The daemon runs under cProfile, which makes it slower by half and calls that do little look dearer than they are: the
shares show where to look, the bench what it brings.
"""

import pstats
import signal
import sys
import tempfile
from pathlib import Path

from cases import CASES, Effort, measure
from peers import AI_TICKET
from processes import canned, start_ai_ticket, telemetry_on

MOST = 25


def shown(where: tuple[str, int, str]) -> str:
    """A function's place, without the folders that only this machine has."""
    file, line, name = where
    if file in ("~", ""):
        return name
    path = Path(file)
    parts = path.parts
    for package in ("ai_ticket", "twisted", "site-packages"):
        if package in parts:
            path = Path(*parts[len(parts) - 1 - parts[::-1].index(package) :])
            break
    else:
        path = Path(path.name)
    return f"{path}:{line} {name}"


def report(stats: pstats.Stats, count: int) -> str:
    """Lines of share, microseconds and calls for each of `count` requests or tokens, and the function."""
    figures = stats.stats  # type: ignore[attr-defined]
    waiting = {where for where in figures if "poll" in where[2] and where[0] == "~"}
    total = sum(own for where, (_, _, own, _, _) in figures.items() if where not in waiting)
    lines = [f"{total / count * 1e6:.0f} us under the profiler for each of {count}"]
    order = sorted((where for where in figures if where not in waiting), key=lambda where: -figures[where][2])
    for where in order[:MOST]:
        _, calls, own, _, _ = figures[where]
        lines.append(f"{own / total:6.1%} {own / count * 1e6:7.1f} us {calls / count:6.2f} calls  {shown(where)}")
    return "\n".join(lines)


def main() -> None:
    """Measure the case under the profiler, and print where the time went."""
    name = sys.argv[1] if len(sys.argv) > 1 else "answers"
    case = next(case for case in CASES if case.name == name)
    with canned(case.backend) as backend, canned("collector") as collector, tempfile.TemporaryDirectory() as folder:
        url = f"http://127.0.0.1:{backend.port}"
        settings = telemetry_on(collector.port) | dict(case.settings)
        options = ["--profile=profile", "--profiler=cprofile", "--savestats"]
        running = start_ai_ticket(Path(folder), url, settings, tls=case.tls, options=options)
        try:
            found = measure(case, AI_TICKET, running.target, Effort(busy=8.0, alone=0.1))
            running.process.send_signal(signal.SIGTERM)
            running.process.wait(30)
        finally:
            running.stop()
        count = found.count * (case.tokens if case.streams else 1)
        print(f"{case.title}, {found.errors} errors:", report(pstats.Stats(str(Path(folder, "profile"))), count))


if __name__ == "__main__":
    main()
