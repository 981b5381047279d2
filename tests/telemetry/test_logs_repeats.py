"""Of warnings and errors that repeat themselves, the first is written and the rest are counted."""

from typing import Any

import pytest
from memory_log import MemoryLog
from twisted.logger import LogLevel
from twisted.python.failure import Failure

from ai_ticket.telemetry.logs_repeats import Repeats


@pytest.fixture
def started() -> Any:
    found = MemoryLog()
    found.logs.start()
    yield found
    found.stop()


def failing(number: int) -> Failure:
    try:
        raise ValueError(number)
    except ValueError:
        return Failure()


def failing_elsewhere() -> Failure:
    try:
        raise ValueError(1)
    except ValueError:
        return Failure()


def test_repeats_are_told_when_their_minute_is_over(started: MemoryLog) -> None:
    for number in range(5):
        started.log.warn("{backend} is down", backend="b1", request_id=f"r{number}", seconds=number)
        started.reactor.advance(1)
    assert started.reader.messages == ["b1 is down"]
    started.reactor.advance(54)
    assert len(started.reader.lines) == 1
    started.reactor.advance(1)
    last = started.reader.lines[-1]
    assert last["message"] == "repeated 4 times within 60 s: b1 is down"
    assert (last["level"], last["logger"], last["repeated"]) == ("WARN", "a.logger", 4)
    assert started.reactor.getDelayedCalls() == []


def test_after_the_minute_it_begins_anew(started: MemoryLog) -> None:
    for _ in range(3):
        started.log.error("broken")
        started.reactor.advance(30)
    assert started.reader.messages == ["broken", "repeated once within 60 s: broken", "broken"]


def test_one_that_was_not_repeated_leaves_nothing_behind(started: MemoryLog) -> None:
    started.log.warn("once")
    assert started.reactor.getDelayedCalls() == []
    started.reactor.advance(61)
    assert started.reader.messages == ["once"]


def test_stopping_tells_of_repeats_at_once(started: MemoryLog) -> None:
    started.log.warn("again")
    started.reactor.advance(2)
    started.log.warn("again")
    started.stop()
    started.log.warn("again")
    assert started.reader.messages == ["again", "repeated once within 2 s: again", "again"]


def test_who_asks_again_gets_an_answer_again(started: MemoryLog) -> None:
    for _ in range(2):
        started.log.error("the key stays in force")
    started.logs.forget_repeats()
    started.log.error("the key stays in force")
    first, told, again = started.reader.messages
    assert told == f"repeated once within 0 s: {first}"
    assert again == first
    started.reactor.advance(60)
    assert len(started.reader.messages) == 3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"backend": "b1"}, {"backend": "b2"}),
        ({"log_level": LogLevel.warn}, {"log_level": LogLevel.error}),
        ({"log_namespace": "a"}, {"log_namespace": "b"}),
        ({"log_format": "down"}, {"log_format": "up"}),
        ({"log_format": "{log_text}", "log_text": "down"}, {"log_format": "{log_text}", "log_text": "up"}),
        ({"log_failure": failing(1)}, {"log_failure": failing_elsewhere()}),
        ({"log_failure": Failure(ValueError("one"))}, {"log_failure": Failure(ValueError("other"))}),
        ({"log_failure": Failure(ValueError("one"))}, {"log_failure": Failure(TypeError("one"))}),
        ({"log_io": "  File"}, {"log_io": "  File"}),
    ],
)
def test_different_events(one: dict[str, Any], other: dict[str, Any]) -> None:
    repeats = Repeats()
    base = {"log_level": LogLevel.warn, "log_namespace": "x", "log_format": "{backend}"}
    first, second = {**base, **one}, {**base, **other}
    assert list(repeats.seen(first, 0)) == [first]
    assert list(repeats.seen(second, 1)) == [second]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"request_id": "r1", "trace_id": "t1", "span_id": "s1"}, {"request_id": "r2", "trace_id": "t2"}),
        ({"count": 1, "seconds": 0.1}, {"count": 2, "seconds": 0.2}),
        ({"peer": "192.0.2.1"}, {"peer": "192.0.2.2"}),
        ({"log_failure": failing(1)}, {"log_failure": failing(2)}),
        (
            {"log_format": "{log_text}", "log_text": "took 1", "log_template": ("took %d",)},
            {"log_format": "{log_text}", "log_text": "took 2", "log_template": ("took %d",)},
        ),
    ],
)
def test_same_events(one: dict[str, Any], other: dict[str, Any]) -> None:
    repeats = Repeats()
    base = {"log_level": LogLevel.error, "log_namespace": "x", "log_format": "{count}"}
    assert list(repeats.seen({**base, **one}, 0))
    assert list(repeats.seen({**base, **other}, 1)) == []
    assert repeats.due == 60


def test_memory_is_bounded() -> None:
    repeats = Repeats(limit=2)
    events = [{"log_level": LogLevel.warn, "log_namespace": "x", "log_format": str(number)} for number in range(3)]
    for event in (events[0], events[0], events[1]):
        repeats.seen(event, 0)
    told, written = repeats.seen(events[2], 6)
    assert (told["repeated"], told["seconds"]) == (1, 6)
    assert written is events[2]
    assert list(repeats.seen(events[0], 6)) == [events[0]]
    assert list(repeats.seen(events[2], 6)) == []


def test_access_lines_are_not_collapsed(started: MemoryLog) -> None:
    for _ in range(3):
        started.log.info("{method} {route} {status}", method="POST", route="/event", status=500)
    assert len(started.reader.lines) == 3


def test_the_earliest_of_several_is_told_in_time(started: MemoryLog) -> None:
    started.log.warn("one")
    started.reactor.advance(10)
    started.log.warn("two")
    started.log.warn("two")
    started.log.warn("one")
    started.reactor.advance(50)
    assert started.reader.messages[2:] == ["repeated once within 60 s: one"]
    started.reactor.advance(10)
    assert started.reader.messages[3:] == ["repeated once within 60 s: two"]


def test_repeats_from_another_thread_set_no_timer_there(started: MemoryLog) -> None:
    import threading

    def warn() -> None:
        started.log.warn("from afar")
        started.log.warn("from afar")

    thread = threading.Thread(target=warn)
    thread.start()
    thread.join()
    assert started.reactor.getDelayedCalls() == []
    [(call, arguments)] = started.reactor.from_threads
    call(*arguments)
    started.reactor.advance(60)
    assert started.reader.messages == ["from afar", "repeated once within 60 s: from afar"]
