"""What the kernel says of memory, in folders that look like it."""

import gc
from pathlib import Path

import pytest

from ai_ticket.memory import MEGABYTE, cgroup_limit, memory_limit, release_memory, settle_memory, used_memory

NO_LIMIT_1 = "9223372036854771712\n"


def kernel(root: Path, cgroups: str | None, limits: dict[str, str]) -> str:
    if cgroups is not None:
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/cgroup").write_text(cgroups)
    for name, text in limits.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


@pytest.mark.parametrize(
    ("cgroups", "limits", "expected"),
    [
        ("0::/\n", {"memory.max": "500\n"}, 500),
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("0::/\n", {}, None),
        ("0::/system.slice/a.service\n", {"system.slice/a.service/memory.max": "500\n"}, 500),
        (
            "0::/system.slice/a.service\n",
            {"system.slice/a.service/memory.max": "500\n", "system.slice/memory.max": "400\n"},
            400,
        ),
        (
            "0::/system.slice/a.service\n",
            {"system.slice/a.service/memory.max": "max\n", "system.slice/memory.max": "400\n"},
            400,
        ),
        ("5:cpu,cpuacct:/x\n4:memory:/x/y\n", {"memory/x/y/memory.limit_in_bytes": "700\n"}, 700),
        ("4:memory:/x\n", {"memory/x/memory.limit_in_bytes": NO_LIMIT_1}, None),
        # A container, where version 1 shows a path that is not there inside.
        ("4:memory:/docker/abc\n0::/\n", {"memory/memory.limit_in_bytes": "600\n"}, 600),
        ("4:memory,hugetlb:/\n", {"memory/memory.limit_in_bytes": "600\n"}, 600),
        ("1:name=systemd:/\n", {"memory.max": "5\n", "memory/memory.limit_in_bytes": "6\n"}, None),
        ("rubbish\n\n::\n", {"memory.max": "5\n"}, None),
        ("0::/\n", {"memory.max": "rubbish\n"}, None),
        ("0::/\n", {"memory.max": "0\n"}, None),
        (None, {"memory.max": "5\n"}, None),
    ],
)
def test_the_limit_of_a_control_group(
    tmp_path: Path, cgroups: str | None, limits: dict[str, str], expected: int | None
) -> None:
    assert cgroup_limit(kernel(tmp_path, cgroups, limits)) == expected


def test_the_setting_wins_over_the_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ai_ticket.memory.cgroup_limit", lambda: 77)
    assert [memory_limit(megabytes) for megabytes in (None, 0, 3)] == [77, None, 3 * MEGABYTE]


def test_what_is_used_is_what_is_resident() -> None:
    before = used_memory()
    assert before is not None
    held = bytearray(64 * MEGABYTE)
    held[:: MEGABYTE // 256] = b"x" * len(held[:: MEGABYTE // 256])
    during = used_memory()
    assert during is not None
    assert 60 * MEGABYTE < during - before < 80 * MEGABYTE
    assert len(held) == 64 * MEGABYTE


def test_what_was_freed_is_no_longer_in_use() -> None:
    """Where something is in use behind it, the C library keeps it."""
    large = [b"x" * (20_000 + number % 2) for number in range(5000)]
    between = [b"x" * (600 + number % 2) for number in range(5000)]
    held = used_memory()
    large.clear()
    release_memory()
    released = used_memory()
    assert held is not None
    assert released is not None
    assert held - released > 80 * MEGABYTE
    assert len(between) == 5000


def test_what_is_there_at_the_start_is_not_searched_for_garbage() -> None:
    """And all the rest only when told to, however much of it there is."""
    before = gc.get_threshold(), gc.get_freeze_count()
    searches = []

    def note(phase: str, found: dict[str, int]) -> None:
        if phase == "start":
            searches.append(found["generation"])

    try:
        settle_memory()
        assert gc.get_freeze_count() > before[1]
        assert len(gc.get_objects()) < 1000
        gc.callbacks.append(note)
        held = [[number] for number in range(1_000_000)]
        gc.callbacks.remove(note)
    finally:
        gc.set_threshold(*before[0])
    assert len(held) == 1_000_000
    assert 100 < searches.count(0) + searches.count(1) < 300
    assert 2 not in searches
