"""Measures AI Ticket and its peers in interleaved rounds: `python ops/bench --help`."""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from cases import CASES, QUICK, Case, Effort, measure, quick, warm_up
from figures import Figures
from peers import BASE, DIRECT, PEERS, Row, Stage, versions
from processes import HERE, Target, canned
from report import Cases, Results, as_json, as_svg, as_table, save, summaries

from ai_ticket import __version__

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ai-ticket" / "bench"


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser("python ops/bench", description=__doc__.partition(":")[0] if __doc__ else None)
    names = [case.name for case in CASES]
    parser.add_argument("--quick", action="store_true", help="a short round of the main cases, to see that it works")
    parser.add_argument(
        "--only", action="append", choices=names, metavar="CASE", help=f"may be repeated; of {', '.join(names)}"
    )
    parser.add_argument("--rounds", type=int, help="how often each row is measured (5; with --quick once)")
    parser.add_argument("--peers", default=",".join(PEERS), help="which are measured (default: %(default)s)")
    parser.add_argument("--seconds", type=float, help="for each measurement of answers (4; with --quick 0.8)")
    parser.add_argument("--workers", help="the setting WORKERS of AI Ticket, for all cases")
    parser.add_argument("--loaders", type=int, default=1, help="processes that make load; more where there are cores")
    parser.add_argument("--environments", type=Path, default=CACHE, help="where the peers are installed (%(default)s)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where results go (%(default)s)")
    parser.add_argument("--no-save", action="store_true", help="print the tables only")
    given = parser.parse_args()
    unknown = set(given.peers.split(",")) - set(PEERS)
    if unknown:
        parser.error(f"--peers: no such peer: {', '.join(sorted(unknown))}")
    return given


def chosen(given: argparse.Namespace) -> list[tuple[Case, tuple[Row, ...]]]:
    """The cases, each with the rows of the peers that take part."""
    names = given.only or (QUICK if given.quick else [case.name for case in CASES])
    cases = [quick(case) if given.quick else case for case in CASES if case.name in names]
    peers = {"backend", *given.peers.split(",")}
    return [(case, tuple(row for row in case.rows if row.peer in peers)) for case in cases]


def run(case: Case, rows: Sequence[Row], stage: Stage, effort: Effort, given: argparse.Namespace) -> Results:
    """A case's rounds. In each, all rows have their turn, each round beginning with another."""
    with canned(case.backend) as backend:
        settings = case.settings + ((("WORKERS", given.workers),) if given.workers else ())
        if case.fresh:
            stage.clear()
        targets: dict[Row, Target] = {}
        for row in rows:
            target = backend if row is DIRECT else stage.get(row, backend.port, case.tls, settings)
            if target is not None:
                targets[row] = target
        if case.about in rows and case.about not in targets:
            return {}
        for row, target in targets.items():
            warm_up(case, row, target)
        found: Results = {row.name: [] for row in targets}
        order = list(targets)
        for number in range(given.rounds or (1 if given.quick else 5)):
            for row in order[number % len(order) :] + order[: number % len(order)]:
                found[row.name].append(measure(case, row, targets[row], effort))
                print(f"{case.name}, round {number + 1}: {row.name}", end="\x1b[K\r", file=sys.stderr, flush=True)
        return found


def main() -> None:
    """Measure, and tell."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is to be stopped too
    given = arguments()
    effort = Effort(0.8, 0.3, given.loaders) if given.quick else Effort(loaders=given.loaders)
    if given.seconds:
        effort = replace(effort, busy=given.seconds)
    done: Cases = {}
    panels = []
    with ExitStack() as stack:
        collector = stack.enter_context(canned("collector"))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench")))
        stage = Stage(given.environments.absolute(), folder, collector.port)
        stack.callback(stage.clear)
        for case, rows in chosen(given):
            found = run(case, rows, stage, effort, given)
            if not found:
                continue
            figures = summaries(found, BASE.name, DIRECT.name)
            done[case.name] = case.title, found, figures
            panels.append((case.title, bool(case.streams), figures))
            print(as_table(case.title, bool(case.streams), figures), flush=True)
            if not given.no_save:
                keep(given, stage, done, panels)


def keep(
    given: argparse.Namespace, stage: Stage, done: Cases, panels: list[tuple[str, bool, list[tuple[str, Figures]]]]
) -> None:
    """Save what is done so far: a long run that is interrupted has not been for nothing."""
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    about = {
        "date": day,
        "cores": os.cpu_count(),
        "versions": {"ai-ticket": __version__, **versions(stage.environments, tuple(given.peers.split(",")))},
        "quick": given.quick,
        "left_out": sorted(stage.missing),
    }
    subtitle = f"AI Ticket {__version__}, {day}, {os.cpu_count()} cores shared with load and model server"
    save(given.results, f"{day}.json", as_json(about, done))
    save(given.results, f"{day}.svg", as_svg(subtitle, panels, DIRECT.name))


if __name__ == "__main__":
    main()
