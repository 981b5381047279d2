"""The log of the process: levels for all sources, noise, the reader that stalls, start and end."""

import logging
import threading
from collections.abc import Iterator

import pytest
from hpack import Decoder, Encoder
from memory_log import MemoryLog
from twisted.logger import Logger, LogLevel, globalLogPublisher
from twisted.python import log as legacy

from ai_ticket.telemetry.logs import Bridge


@pytest.fixture
def everything() -> Iterator[MemoryLog]:
    """A log that all of the process logs to."""
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    found = MemoryLog()
    found.logs.start()
    globalLogPublisher.addObserver(found.logs)
    yield found
    globalLogPublisher.removeObserver(found.logs)
    found.stop()
    root.setLevel(before[0])
    root.handlers[:] = before[1]


def test_levels_can_be_changed_while_it_runs() -> None:
    found = MemoryLog("WARN")
    found.log.info("no")
    found.logs.level = "DEBUG"
    found.log.debug("yes")
    found.logs.level = "INFO"
    found.log.debug("no")
    assert found.reader.messages == ["yes"]
    assert found.logs.level == "INFO"


def test_each_line_of_a_worker_says_which_it_is() -> None:
    found = MemoryLog(worker=3)
    found.log.info("a line", x=1)
    found.log.info("its own", worker=5)
    assert [line["worker"] for line in found.reader.lines] == [3, 5]


def test_all_sources_follow_the_level(everything: MemoryLog) -> None:
    """Twisted's old and new loggers, the standard library's, and our own."""

    def heard(level: str) -> list[str]:
        everything.logs.level = level
        before = len(everything.reader.lines)
        Logger(namespace="ai_ticket.web").debug("ours")
        Logger(namespace="twisted.web").debug("Twisted's")
        legacy.msg("old")
        logging.getLogger("some.library").debug("the library's")
        logging.getLogger("some.library").info("the library's, louder")
        return everything.reader.messages[before:]

    assert heard("INFO") == ["old", "the library's, louder"]
    assert heard("DEBUG") == ["ours", "Twisted's", "old", "the library's", "the library's, louder"]
    assert heard("WARNING") == []
    assert heard("INFO") == ["old", "the library's, louder"]


def test_the_standard_librarys_loggers_come_out_here_too(everything: MemoryLog) -> None:
    logger = logging.getLogger("some.library")
    logger.warning("a %s {with} braces", "message")
    try:
        raise ValueError("why")
    except ValueError:
        logger.exception("it broke")
    Bridge().handle(logging.LogRecord("some.library", logging.WARNING, "", 1, "%d does not fit", ("this",), None))
    logger.log(35, "between levels")
    first, second, third, fourth = everything.reader.lines
    assert (first["level"], first["logger"], first["message"]) == ("WARN", "some.library", "a message {with} braces")
    assert "ValueError: why" in second["exception"]
    assert third["message"] == "%d does not fit ('this',)"
    assert fourth["level"] == "WARN"


def test_the_standard_librarys_warnings_collapse_by_their_template(everything: MemoryLog) -> None:
    logger = logging.getLogger("some.library")
    for number in range(3):
        logger.warning("retrying %s in %d s", "x", number)
    logger.warning("retrying %s in %d s", "y", 1)
    assert everything.reader.messages == ["retrying x in 0 s", "retrying y in 1 s"]


@pytest.mark.parametrize(
    "name", ["hpack", "hpack.hpack", "h2.connection", "urllib3.connectionpool", "asyncio", "httpx"]
)
def test_libraries_that_log_headers_stay_silent_at_any_level(everything: MemoryLog, name: str) -> None:
    for level in ("DEBUG", "INFO", "DEBUG"):
        everything.logs.level = level
        logging.getLogger(name).debug("authorization: Bearer canary")
        logging.getLogger(name).info("authorization: Bearer canary")
        logging.getLogger("another").debug("heard")
    logging.getLogger(name).warning("serious")
    assert everything.reader.messages == ["heard", "heard", "serious"]


def test_no_token_from_http2_at_debug(everything: MemoryLog) -> None:
    """hpack logs each header that it decodes, an Authorization among them, at DEBUG."""
    everything.logs.level = "DEBUG"
    encoder, decoder = Encoder(), Decoder()
    decoder.decode(encoder.encode([("authorization", "Bearer canary")]))
    assert "canary" not in everything.reader.text


def test_starting_twice_bridges_once(everything: MemoryLog) -> None:
    another = MemoryLog()
    another.logs.start()
    logging.getLogger("some.library").error("once")
    assert everything.reader.messages == ["once"]
    another.stop()
    assert sum(isinstance(handler, Bridge) for handler in logging.getLogger().handlers) == 1


def test_twisteds_factories_and_ports_are_for_who_debugs(everything: MemoryLog) -> None:
    def tell() -> None:
        Logger(namespace="twisted.web.client._HTTP11ClientFactory").info("Starting factory {factory!r}", factory=1)
        legacy.msg("ConnectionFactory starting on 8443")
        legacy.msg("TLSMemoryBIOFactory (TLS) starting on '/run/x'")
        legacy.msg("(TCP Port 8443 Closed)")

    tell()
    legacy.msg("Port 5 is closed")
    assert everything.reader.messages == ["Port 5 is closed"]
    everything.logs.level = "DEBUG"
    tell()
    assert {line["level"] for line in everything.reader.lines[1:]} == {"DEBUG"}
    assert len(everything.reader.lines) == 5


def test_a_reader_that_stalls_is_tried_again_until_it_reads() -> None:
    found = MemoryLog()
    found.logs.start()
    found.reader.room = 0
    found.log.info("one")
    found.log.info("two")
    assert len(found.reactor.getDelayedCalls()) == 1
    for _ in range(3):
        found.reactor.advance(0.1)
        assert len(found.reactor.getDelayedCalls()) == 1
    found.reader.room = None
    found.reactor.advance(0.1)
    assert found.reader.messages == ["one", "two"]
    assert found.reactor.getDelayedCalls() == []
    assert found.reader.waits == []
    found.stop()


def test_lines_dropped_are_counted_in_a_line_of_their_own() -> None:
    found = MemoryLog()
    found.logs.start()
    found.reader.room = 0
    for _ in range(15):
        found.log.info("{text}", text="x" * 50_000)
    found.reader.room = None
    found.reactor.advance(0.1)
    last = found.reader.lines[-1]
    kept = len(found.reader.lines) - 1
    assert 5 < kept < 15
    assert (last["level"], last["dropped"]) == ("WARN", 15 - kept)
    assert last["logger"] == "ai_ticket.telemetry.logs.Logs"
    found.stop()


def test_what_another_thread_logs_wakes_the_reactor_to_try_again() -> None:
    found = MemoryLog()
    found.logs.start()
    found.reader.room = 0
    thread = threading.Thread(target=found.log.info, args=("from afar",))
    thread.start()
    thread.join()
    assert found.reactor.getDelayedCalls() == []
    for call, arguments in found.reactor.from_threads:
        call(*arguments)
    found.reader.room = None
    found.reactor.advance(0.1)
    assert found.reader.messages == ["from afar"]
    found.stop()


def test_the_end_waits_for_the_reader_but_not_for_ever() -> None:
    found = MemoryLog()
    found.logs.start()
    found.reader.room = 0
    found.log.info("one")
    found.stop()
    assert found.reader.waits == [2.0]
    found.reader.when_waited_for = lambda: setattr(found.reader, "room", None)
    found.log.info("two")
    assert found.reader.messages == ["one", "two"]
    found.log.info("three")
    assert found.reader.messages == ["one", "two", "three"]


def test_nothing_is_set_up_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """twistd forks after the log has begun."""
    found = MemoryLog()
    found.reader.room = 0
    for _ in range(2):
        found.log.error("early")
    assert found.reactor.getDelayedCalls() == found.reactor.from_threads == found.reactor.at_shutdown == []
    found.reader.room = None
    found.logs.start()
    found.log.info("started")
    assert found.reader.messages == ["early", "early", "started"]
    found.stop()


def test_where_the_start_fails_the_interpreters_end_lets_the_lines_out(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = []
    monkeypatch.setattr("atexit.register", registered.append)
    found = MemoryLog()
    found.logs.start()
    found.log.error("can't listen")
    found.log.error("can't listen")
    for call in registered:
        call()
    assert found.reader.messages == ["can't listen", "repeated once within 0 s: can't listen"]
    assert found.reactor.getDelayedCalls() == []


def test_text() -> None:
    found = MemoryLog(form="text")
    found.log.info("said", a=1)
    assert found.reader.text.endswith("INFO     said a=1 logger=a.logger\n")


def test_payloads_without_debug_are_pointed_out(everything: MemoryLog) -> None:
    quiet, loud, off = MemoryLog(payloads=1), MemoryLog("DEBUG", payloads=1), MemoryLog()
    for found in (loud, off, quiet):
        found.logs.start()
        found.stop()
    assert everything.reader.messages == ["LOG_PAYLOADS has no effect while LOG_LEVEL is INFO"]


def test_payloads_are_logged_at_debug_only(everything: MemoryLog) -> None:
    everything.logs.payloads.a_minute = 5
    everything.logs.payloads.sample("r1", "/event", b"{}", "ok")
    everything.logs.level = "DEBUG"
    everything.logs.payloads.sample("r2", "/event", b"{}", "ok")
    assert [line["request_id"] for line in everything.reader.lines] == ["r2"]


def test_unknown_levels_count_as_info() -> None:
    found = MemoryLog()
    found.logs({"log_format": "odd", "log_time": 1.0})
    assert found.reader.lines[0]["level"] == "INFO"


def test_standard_error_is_a_source_like_any(everything: MemoryLog) -> None:
    """twistd puts a file in its place that logs each line; they are no repeats of each other."""
    from twisted.logger import LoggingFile

    LoggingFile(logger=Logger(namespace="stderr"), level=LogLevel.error).write("same\nsame\n")
    assert everything.reader.messages == ["same", "same"]
