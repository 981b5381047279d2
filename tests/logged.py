"""What is logged while something is done."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from twisted.logger import formatEvent, globalLogPublisher


@contextmanager
def logged() -> Iterator[list[str]]:
    """The messages, with their levels, as in "warn: ..."."""
    found: list[str] = []

    def observe(event: dict[str, Any]) -> None:
        if event["log_namespace"].startswith("ai_ticket."):
            found.append(f"{event['log_level'].name}: {formatEvent(event)}")

    globalLogPublisher.addObserver(observe)
    try:
        yield found
    finally:
        globalLogPublisher.removeObserver(observe)
