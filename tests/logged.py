"""What is logged while something is done."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from twisted.logger import LogLevel, formatEvent, globalLogPublisher


@contextmanager
def _observing(observe: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    globalLogPublisher.addObserver(observe)
    try:
        yield
    finally:
        globalLogPublisher.removeObserver(observe)


@contextmanager
def logged() -> Iterator[list[str]]:
    """The messages, with their levels, as in "warn: ..."."""
    found: list[str] = []

    def observe(event: dict[str, Any]) -> None:
        if event["log_namespace"].startswith("ai_ticket."):
            found.append(f"{event['log_level'].name}: {formatEvent(event)}")

    with _observing(observe):
        yield found


@contextmanager
def logged_facts(message: str) -> Iterator[list[dict[str, Any]]]:
    """What the lines with this message say beside it."""
    found: list[dict[str, Any]] = []

    def observe(event: dict[str, Any]) -> None:
        if formatEvent(event) == message:
            found.append({name: value for name, value in event.items() if not name.startswith("log_")})

    with _observing(observe):
        yield found


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

    with _observing(observe):
        yield
    assert not seen, "\n".join(seen)
