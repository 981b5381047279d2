"""How many workers there are to be."""

import os
from pathlib import Path

import pytest

from ai_ticket.environment import ConfigurationError, load
from ai_ticket.settings import Settings
from ai_ticket.workers import cores
from ai_ticket.workers.cores import available_cores, worker_count


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


@pytest.mark.parametrize(
    ("said", "cores"),
    [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("rubbish", 8), (None, 8)],
)
def test_the_time_of_the_group_counts(tmp_path: Path, eight: None, said: str | None, cores: int) -> None:
    file = tmp_path / "cpu.max"
    if said is not None:
        file.write_text(said + "\n")
    assert available_cores(file) == cores


def test_a_number_is_what_it_says(eight: None) -> None:
    assert worker_count(Settings()) == 1
    assert worker_count(Settings(workers="3")) == 3


def test_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "available_cores", lambda: 100)
    assert worker_count(Settings(workers="AUTO")) == cores.MOST_WORKERS


@pytest.mark.parametrize("value", ["0", "65", "-1", "1.5", "many", "auto2"])
def test_what_is_no_number_of_workers(value: str) -> None:
    with pytest.raises(ConfigurationError) as found:
        load({"AI_TICKET_AUTH": "off", "WORKERS": value})
    assert found.value.problems == [f"WORKERS={value!r}: must be a whole number from 1 to 64, or auto"]
