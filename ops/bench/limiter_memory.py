"""What counting 100,000 clients of 120 calls each takes: memory, aim under 80 MB, and CPU for each call.

`python ops/bench/limiter_memory.py` on Linux takes some minutes; each line is from a process of its own.
"""

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from twisted.internet.task import Clock

from ai_ticket.limit.memory import MemoryLimiter

CLIENTS = 100_000
CALLS = 120
ORDERS = ("in turn", "at random")


def address(number: int) -> str:
    """An IPv4 address, none of them short."""
    return f"203.{100 + number // 62_500}.{number // 250 % 250}.{number % 250}"


def token(number: int) -> str:
    """What stands for a token."""
    return f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}"


KEYS = {"addresses": address, "tokens": token}


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(keys: str, order: str) -> None:
    """Let all clients call until none has anything left, and print what that took."""
    clock = Clock()
    clock.advance(1_790_000_000.0)
    limiter = MemoryLimiter(clock, limit=CALLS, window=60.0, max_clients=CLIENTS)
    key = KEYS[keys]
    chance = random.Random(1)  # noqa: S311
    before = resident()
    spent = 0.0
    for _ in range(CALLS):
        for start in range(0, CLIENTS, 1000):
            clock.advance(0.004)
            numbers = range(start, start + 1000)
            if order == "at random":
                numbers = chance.choices(range(CLIENTS), k=1000)
            names = [key(number) for number in numbers]
            begun = time.process_time()
            for name in names:
                limiter.admit(name)
            spent += time.process_time() - begun
    for number in range(CLIENTS):
        while limiter.admit(key(number)).result.admitted:
            pass
    megabytes = (resident() - before) / 1e6
    print(f"{keys}, {order}: {len(limiter)} clients, {megabytes:.1f} MB, {spent / CALLS / CLIENTS * 1e6:.2f} us a call")


def main() -> None:
    """Measure each kind of key in each order, or what is asked for alone."""
    parser = argparse.ArgumentParser(description="What counting 100,000 clients takes: memory, and CPU for each call.")
    parser.add_argument("--keys", choices=KEYS, help="these alone")
    parser.add_argument("--order", choices=ORDERS, help="calls in this order alone")
    given = parser.parse_args()
    if given.keys and given.order:
        measure(given.keys, given.order)
        return
    for keys in [given.keys] if given.keys else KEYS:
        for order in [given.order] if given.order else ORDERS:
            subprocess.run([sys.executable, __file__, "--keys", keys, "--order", order], check=True)  # noqa: S603


if __name__ == "__main__":
    main()
