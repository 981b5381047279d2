"""What must never be in a log: failures that nobody expected."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from twisted.logger import LogLevel, formatEvent, globalLogPublisher


@contextmanager
def clean_log() -> Iterator[None]:
    """Within this nothing may log a failure, or anything critical.

    @raise AssertionError: something did.
    """
    seen: list[str] = []

    def observe(event: dict[str, Any]) -> None:
        if "log_failure" in event or event.get("log_level") is LogLevel.critical:
            failure = event.get("log_failure")
            seen.append(f"{formatEvent(event)}\n{failure.getTraceback() if failure is not None else ''}")

    globalLogPublisher.addObserver(observe)
    try:
        yield
    finally:
        globalLogPublisher.removeObserver(observe)
    assert not seen, "\n".join(seen)
