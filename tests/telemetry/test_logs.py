"""Log lines: one JSON object each, whatever was logged."""

import io
import json
import logging
from typing import Any

import pytest
from hpack import Decoder, Encoder
from twisted.logger import Logger, LogLevel, globalLogPublisher
from twisted.python.failure import Failure

from ai_ticket.telemetry.logs import Bridge, Logs


class Captured:
    """A log whose lines are kept."""

    def __init__(self, level: str = "INFO"):
        self.out = io.StringIO()
        self.logs = Logs(level, self.out)
        self.log = Logger("a.logger", observer=self.logs.observer)

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.getvalue().splitlines()]


def test_a_line() -> None:
    captured = Captured()
    captured.log.info("{verb} {what}\nand more", verb="GET", what=b"x", request_id="r1", number=5, nothing=None)
    [line] = captured.lines
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "INFO",
        "logger": "a.logger",
        "message": "GET b'x'\nand more",
        "verb": "GET",
        "what": "b'x'",
        "request_id": "r1",
        "number": 5,
        "nothing": None,
    }


def test_levels_can_be_changed_while_it_runs() -> None:
    captured = Captured("WARN")
    captured.log.info("no")
    captured.logs.level = "DEBUG"
    captured.log.debug("yes")
    assert [line["message"] for line in captured.lines] == ["yes"]
    captured.logs.level = "INFO"


def test_failures_show_their_traceback() -> None:
    captured = Captured()
    captured.log.failure("it broke", Failure(RuntimeError("why")))
    [line] = captured.lines
    assert line["level"] == "CRITICAL"
    assert "RuntimeError: why" in line["exception"]


@pytest.mark.parametrize("value", ["\ud800", "\x00\x1b[31m", "ü", float("nan"), 2**100, object, b"\xff"])
def test_anything_can_be_logged(value: Any) -> None:
    captured = Captured()
    captured.log.info("{value}", value=value)
    assert len(captured.lines) == 1


def test_a_format_that_does_not_fit_is_still_a_line() -> None:
    captured = Captured()
    captured.log.info("{missing}", present=1)
    assert len(captured.lines) == 1


def test_the_standard_librarys_loggers_come_out_here_too() -> None:
    captured = Captured()
    globalLogPublisher.addObserver(captured.logs.observer)
    logger = logging.getLogger("some.library")
    handler = Bridge()
    logger.addHandler(handler)
    try:
        logger.warning("a %s {with} braces", "message")
        try:
            raise ValueError("why")
        except ValueError:
            logger.exception("it broke")
    finally:
        logger.removeHandler(handler)
        globalLogPublisher.removeObserver(captured.logs.observer)
    first, second = captured.lines
    assert (first["level"], first["logger"], first["message"]) == ("WARN", "some.library", "a message {with} braces")
    assert "ValueError: why" in second["exception"]


def test_connections_to_model_servers_are_not_worth_a_line_each() -> None:
    captured = Captured()
    noisy = Logger("twisted.web.client._HTTP11ClientFactory", observer=captured.logs.observer)
    noisy.emit(LogLevel.info, "Starting factory")
    assert captured.lines == []


def test_libraries_that_log_headers_stay_silent_at_any_level() -> None:
    """hpack logs each header that it decodes, an Authorization among them, at DEBUG."""
    captured = Captured("DEBUG")
    captured.logs.bridge()
    globalLogPublisher.addObserver(captured.logs.observer)
    try:
        encoder, decoder = Encoder(), Decoder()
        decoder.decode(encoder.encode([("authorization", "Bearer canary")]))
        logging.getLogger("another").debug("heard")
    finally:
        globalLogPublisher.removeObserver(captured.logs.observer)
        captured.logs.level = "INFO"
        root = logging.getLogger()
        for handler in [handler for handler in root.handlers if isinstance(handler, Bridge)]:
            root.removeHandler(handler)
    assert "canary" not in captured.out.getvalue()
    assert [line["message"] for line in captured.lines] == ["heard"]
