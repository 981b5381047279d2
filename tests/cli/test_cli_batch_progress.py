"""How a batch says how far it is."""

import io
import sys

import pytest
from twisted.internet.task import Clock

from ai_ticket.cli.batch_delivery import Gate
from ai_ticket.cli.batch_progress import Tally, shown


def ok(prompt=5, completion=7):
    return {"status": 200, "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


def error(code):
    return {"status": 422, "error": code}


def test_the_summary():
    clock = Clock()
    tally = Tally(clock, 10_000, 2_000, 3)
    for result in [ok()] * 1_200 + [error("a")] * 2 + [error("b")] * 3 + [{"status": 200, "usage": None}]:
        tally.add(result)
    clock.advance(60)
    assert tally.summary() == [
        "1,201 answered, 5 failed (b 3, a 2), 2,000 skipped as already done (3 of them failed)",
        "60.0 s, 20.1 events/s, 14,400 tokens (6,000 of prompts, 8,400 of completions)",
    ]


def test_the_summary_of_nothing():
    assert Tally(Clock(), 0, 0, 0).summary() == [
        "0 answered, 0 failed",
        "0.0 s, 0.0 events/s, 0 tokens (0 of prompts, 0 of completions)",
    ]


def test_off_a_terminal(capsys):
    """A line every ten seconds, with what is worth saying at the time; nothing after the end."""
    clock = Clock()
    tally, gate = Tally(clock, 1_000_000, 10, 0), Gate(clock, lambda: 0.0)
    with shown(clock, tally, gate):
        clock.advance(9)
        assert capsys.readouterr() == ("", "")
        for _ in range(1_000):
            tally.add(ok())
        clock.advance(1)
        assert capsys.readouterr() == ("", "1,010/1,000,000  100.0/s  2 h 46 min left\n")
        tally.add(error("a"))
        gate.close(0, 25, "Too many\x1b.")
        clock.advance(10)
        shown_now = "1,011/1,000,000  50.0/s  5 h 33 min left  1 failed  waiting 15 s: Too many\\x1b.\n"
        assert capsys.readouterr() == ("", shown_now)
    clock.advance(100)
    assert capsys.readouterr() == ("", "")
    assert clock.getDelayedCalls() == []


def test_the_rate_is_that_of_the_last_minute(capsys):
    clock = Clock()
    tally = Tally(clock, None, 0, 0)
    with shown(clock, tally, Gate(clock, lambda: 0.0)):
        for second in range(120):
            for _ in range(2 if second < 60 else 5):
                tally.add(ok())
            clock.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[5] == "120  2.0/s"
    assert lines[8] == "270  3.5/s"
    assert lines[-1] == "420  5.0/s"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("total", [100, None])
def test_on_a_terminal(total, monkeypatch):
    """A bar, which is gone in the end, and the cursor is there again."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "80")
    clock = Clock()
    tally, gate = Tally(clock, total, 0, 0), Gate(clock, lambda: 0.0)
    with shown(clock, tally, gate):
        tally.add(ok())
        gate.close(0, 600, "[bold]" + "No. " * 100)
        clock.advance(0.25)
        written = sys.stderr.getvalue()
        assert ("1/100  4.0/s  25 s left  waiting 10 min: [bold]No." if total else "1  4.0/s  waiting") in written
        assert "…" in written
        assert "\n" not in written
        assert written.rpartition("\r")[2].count("━") == 20
    written = sys.stderr.getvalue()
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")
    assert written.endswith("\x1b[2K")


def test_a_terminal_that_shows_the_answers_too(monkeypatch):
    """They would write over each other: lines instead."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    clock = Clock()
    with shown(clock, Tally(clock, 1, 0, 0), Gate(clock, lambda: 0.0), bar=False):
        clock.advance(10)
    assert sys.stderr.getvalue() == "0/1  0.0/s\n"


def test_nobody_who_looks(monkeypatch):
    """Where stderr was closed the batch goes on without."""

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    clock = Clock()
    monkeypatch.setattr(sys, "stderr", Closed())
    with shown(clock, Tally(clock, 1, 0, 0), Gate(clock, lambda: 0.0)):
        clock.advance(10)
        assert clock.getDelayedCalls() == []
