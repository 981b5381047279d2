"""How many workers WORKERS stands for."""

import os
from contextlib import suppress
from math import ceil
from pathlib import Path

from ai_ticket.settings import Settings

MOST_WORKERS = 64
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def worker_count(settings: Settings) -> int:
    """How many processes are to serve; 1: this one alone."""
    if settings.workers.lower() != "auto":
        return int(settings.workers)
    return min(available_cores(), MOST_WORKERS)


def available_cores(cpu_max: Path = _CPU_MAX) -> int:
    """Cores that this process may use: those that it may run on, and no more than its control group has the time of.

    @param cpu_max: the group's file; what it says is a time and a period, or `max` for any time.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        time, period = cpu_max.read_text().split()
        cores = min(cores, max(1, ceil(int(time) / int(period))))
    return cores
