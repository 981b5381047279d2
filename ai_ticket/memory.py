"""How much memory this process uses, and how much its control group may: what the kernel says, in files in memory."""

import ctypes
import gc
import os
from collections.abc import Iterator
from pathlib import PurePosixPath

MEGABYTE = 1_048_576

YOUNG, RARELY = 5000, 5
"""After so many new objects that may form cycles they are searched, and after so many times all since the time before.

A request leaves nothing to be found; the first search takes less than a millisecond, the second less than ten.
"""

_ON_REQUEST = 1_000_000_000

_UNLIMITED = 1 << 60
"""What version 1 says where there is no limit is a little less than 2^63."""


def memory_limit(megabytes: int | None) -> int | None:
    """The bytes that MEMORY_LIMIT_MB stands for; None: there is no limit."""
    return cgroup_limit() if megabytes is None else megabytes * MEGABYTE or None


def used_memory() -> int | None:
    """Bytes of memory that this process has in use (its resident set); None where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return None


_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def settle_memory() -> None:
    """What is there now is there for good: garbage is not searched for in it again, and in all the rest when told to.

    Such a search stops everything, for longer the more callers there are: with 25,000 requests waiting, 140 ms.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, RARELY, _ON_REQUEST)


def release_memory() -> None:
    """Give back what was freed: the C library keeps it in the gaps between what is in use. Some milliseconds.

    After thousands of connections that is most of what they took.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # the GNU C library has it, others do without
    if trim is not None:
        trim(0)


def cgroup_limit(root: str = "/") -> int | None:
    """The least of the limits, in bytes, on the control group that this process is in and on those above it.

    None where there is none. @param root: where /proc and /sys are.
    """
    return min(_limits(root), default=None)


def _limits(root: str) -> Iterator[int]:
    for folder, name in _folders(root):
        try:
            with open(os.path.join(root, folder, name), "rb") as file:
                limit = int(file.read())
        except (OSError, ValueError):  # the folder is out of our sight, or has no limit: "max"
            continue
        if 0 < limit < _UNLIMITED:
            yield limit


def _folders(root: str) -> Iterator[tuple[str, str]]:
    """The folders of the groups, from ours up to what is the root for us, and what the limit's file is called there."""
    try:
        with open(os.path.join(root, "proc/self/cgroup"), encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            base, name = "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, name = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for each in (group, *group.parents):
            yield os.path.join(base, each), name
