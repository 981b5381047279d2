"""`python -m tests.fuzz`: every target in memory for as long as you like, then the running service."""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from random import SystemRandom

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.against_daemon import fuzz_daemon
from fuzz.targets import TARGETS, try_case

DAEMON = "daemon"


def say(text: str) -> None:
    """Tell whoever waits."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)  # noqa: T201


def fuzz_in_memory(name: str, seed: int, seconds: float) -> None:
    """A target, for so many seconds.

    @raise AssertionError: it went wrong.
    """
    target = TARGETS[name]()
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        try_case(target, name, seed, number)
        number += 1
    say(f"{name}: {number} cases")


def main() -> None:
    """Do as the arguments say."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="for the targets in memory, in all (%(default)s)")
    parser.add_argument("--requests", type=int, default=100_000, help="to the running service (%(default)s)")
    parser.add_argument("--seed", type=int, default=SystemRandom().randrange(10**6), help="of all randomness")
    parser.add_argument("--target", choices=[*TARGETS, DAEMON], help="this one alone")
    parser.add_argument("--case", type=int, help="of the target: this one alone")
    options = parser.parse_args()
    say(f"--seed {options.seed}")
    names = [options.target] if options.target else [*TARGETS, DAEMON]
    for name in names:
        if name == DAEMON:
            with tempfile.TemporaryDirectory() as folder:
                found = fuzz_daemon(
                    Path(folder), seed=options.seed, requests=options.requests, say=say, case=options.case
                )
            say(f"{dict(found.kinds)}, answered {dict(sorted(found.statuses.items()))}, {found.unanswered} not")
            if options.case is None:
                say(f"memory after the warm-up and at the end: {found.growth:.3f}; descriptors {found.descriptors}")
        elif options.case is not None:
            try_case(TARGETS[name](), name, options.seed, options.case)
        else:
            fuzz_in_memory(name, options.seed, options.seconds / len([each for each in names if each != DAEMON]))


if __name__ == "__main__":
    main()
