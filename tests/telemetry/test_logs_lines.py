"""A line of the log for each event, whatever is in it: as JSON, and as text for a terminal."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.logger import Logger, LogLevel, formatEvent
from twisted.python import log as legacy
from twisted.python.failure import Failure

from ai_ticket.telemetry.logs_lines import Event, json_line, message, text_line

RESERVED = ("time", "level", "logger", "message", "exception")
ODD = ["\ud800", "\x00\x1b[31m", "ü", float("nan"), 2**100, object, b"\xff", ["a", {}], "\x9b0m \u2028"]


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


def event(log_format: str = "said", log_level: LogLevel = LogLevel.info, **fields: Any) -> Event:
    return {"log_format": log_format, "log_level": log_level, "log_namespace": "a.logger", "log_time": 0.0625, **fields}


def as_json(found: Event) -> dict[str, Any]:
    [line, end] = json_line(found).decode().split("\n")
    assert end == ""
    value: dict[str, Any] = json.loads(line)
    return value


def as_text(found: Event, *, colours: bool = False) -> str:
    return text_line(found, colours=colours).decode()


def test_json() -> None:
    found = event("{verb} {what}\nand more", verb="GET", what=b"x", request_id="r1", number=5, nothing=None)
    assert as_json(found) == {
        "time": "1970-01-01T00:00:00.062+00:00",
        "level": "INFO",
        "logger": "a.logger",
        "message": "GET b'x'\nand more",
        "verb": "GET",
        "what": "x",
        "request_id": "r1",
        "number": 5,
        "nothing": None,
    }


def test_counts_are_an_object() -> None:
    assert as_json(event(errors={"overloaded": 2}))["errors"] == {"overloaded": 2}
    assert as_json(event(odd={1: Unprintable(), None: b"x"}))["odd"].keys() == {"1", "None"}


@pytest.mark.parametrize("when", [1.0009, 1_795_289_340.999999, 1_795_289_341.0, 59.9996])
def test_times_are_cut_to_milliseconds(when: float) -> None:
    from datetime import UTC, datetime

    expected = datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds")
    assert as_json({**event(), "log_time": when})["time"] == expected


def test_a_field_does_not_take_the_place_of_ours() -> None:
    line = as_json(event("it said {message}", **dict.fromkeys(RESERVED, "mine"), log_failure=Failure(KeyError("why"))))
    assert (line["level"], line["logger"], line["message"]) == ("INFO", "a.logger", "it said mine")
    assert line["time"].startswith("1970-")
    assert "KeyError" in line["exception"]
    assert [line[f"{name}_"] for name in RESERVED] == ["mine"] * 5


@given(st.dictionaries(st.text(max_size=8) | st.sampled_from(RESERVED), st.text(max_size=8) | st.integers()))
def test_no_field_at_all_does(fields: dict[str, Any]) -> None:
    fields = {name: value for name, value in fields.items() if not name.startswith("log_")}
    line = as_json(event(**{"request_id": "r1", "trace_id": "t1", "span_id": "s1", **fields}))
    ours = {name: line[name] for name in ("time", "level", "logger", "message")}
    assert ours == {
        "time": "1970-01-01T00:00:00.062+00:00",
        "level": "INFO",
        "logger": "a.logger",
        "message": "said",
    }
    assert "exception" not in line
    for name in ("request_id", "trace_id", "span_id"):
        assert line[name] == fields.get(name, f"{name[0]}1")


@pytest.mark.parametrize("value", [*ODD, Unprintable()])
def test_anything_can_be_logged(value: Any) -> None:
    found = event("{value}", value=value)
    as_json(found)
    assert as_text(found).count("\n") == 1
    assert as_text(found)[:-1].isprintable()


@pytest.mark.parametrize("log_format", ["{missing}", "{", "{0}", "{present!x}", b"{present}", None, "{call()}"])
def test_a_format_that_does_not_fit_is_still_a_line(log_format: Any) -> None:
    found = {**event(present=1, call=lambda: "called"), "log_format": log_format}
    assert as_json(found)["present"] == 1
    assert as_text(found).count("\n") == 1


@given(st.sampled_from(["plain", "{a}", "{a!r} {b:>5}", "{{}} {a}", "{a.real}", "{c()}"]), st.integers(), st.text())
def test_messages_are_those_of_twisted(log_format: str, a: int, b: str) -> None:
    found = event(log_format, a=a, b=b, c=lambda: b)
    assert message(found) == formatEvent(found)


def test_json_does_nothing_to_a_terminal_and_is_one_line_for_everybody() -> None:
    line = json_line(event("{x}", x="\x1b[31m \x9b31m \x85 \u2028 \u2029 é")).decode()
    assert "é" in line
    assert len(line.splitlines()) == 1
    assert all(each.isprintable() for each in line[:-1])
    assert json.loads(line)["x"] == "\x1b[31m \x9b31m \x85 \u2028 \u2029 é"


def legacy_events(*calls: Any) -> list[Event]:
    events: list[Event] = []
    publisher = legacy.LogPublisher()
    publisher._publishPublisher = events.append
    for call in calls:
        call(publisher)
    return events


def test_twisteds_old_interface() -> None:
    [found] = legacy_events(lambda log: log.msg("it", "happened", system="HTTP,1", size=5))
    line = as_json(found)
    del line["time"]
    assert line == {"level": "INFO", "logger": "log_legacy", "message": "it happened", "size": 5}


def test_failures_of_twisteds_old_interface() -> None:
    failure = Failure(RuntimeError("why"))
    [found] = legacy_events(lambda log: log.msg(failure=failure, why="it broke", isError=1))
    line = as_json(found)
    assert (line["level"], line["message"]) == ("CRITICAL", "it broke")
    assert "RuntimeError: why" in line["exception"]


def test_text() -> None:
    found = event("{method} {route} {status}", method="POST", route="/event", status=200, request_id="r1", duration=0.5)
    assert as_text(found) == (
        "1970-01-01T00:00:00.062+00:00 INFO     POST /event 200 request_id=r1 duration=0.5 logger=a.logger\n"
    )


def test_text_is_one_line_with_all_that_is_odd_escaped() -> None:
    found = event("a\nb\x1b[2J\x9b", name="two words", empty="", equal="a=b", quote='"', back="\\", bad="\r\n\u202e")
    assert as_text(found) == (
        "1970-01-01T00:00:00.062+00:00 INFO     a\\nb\\x1b[2J\\x9b "
        'name="two words" empty="" equal="a=b" quote="\\"" back="\\\\" bad="\\\\r\\\\n\\\\u202e" logger=a.logger\n'
    )


def test_text_shows_tracebacks_as_they_are() -> None:
    try:
        raise ValueError("first\nsecond\x1b[2J")
    except ValueError:
        lines = as_text(event("it broke", LogLevel.critical, log_failure=Failure())).split("\n")
    assert "CRITICAL it broke" in lines[0]
    assert lines[1] == "    Traceback (most recent call last):"
    assert "    builtins.ValueError: first" in lines
    assert lines[-2:] == ["    second\\x1b[2J", ""]
    assert all(line.startswith("    ") for line in lines[1:-1])


@pytest.mark.parametrize(
    ("level", "colour"), [(LogLevel.warn, "33"), (LogLevel.error, "31"), (LogLevel.critical, "1;31")]
)
def test_colours_where_wanted(level: LogLevel, colour: str) -> None:
    found = event("said", level, a=1)
    assert f"\x1b[{colour}m{level.name.upper()}" in as_text(found, colours=True)
    assert "\x1b" not in as_text(found)
    import re

    assert re.sub("\x1b\\[[0-9;]*m", "", as_text(found, colours=True)) == as_text(found)


def test_loggers_of_classes() -> None:
    events: list[Event] = []

    class Room:
        log = Logger(observer=events.append)

    Room().log.info("said")
    assert as_json(events[0])["logger"].endswith("Room")
