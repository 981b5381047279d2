"""Warnings and errors that repeat themselves: the first is written, the rest are counted."""

from collections.abc import Iterable, Iterator

from msgspec import Struct
from twisted.logger import LogLevel
from twisted.python.reflect import safe_str

from ai_ticket.telemetry.logs_lines import Event, failure_of, message

WINDOW_SECONDS = 60.0
LIMIT = 256
"""Different events that are watched at a time; the oldest makes room for a newcomer."""

_LONGEST_MESSAGE = 500
_DIFFERENT = frozenset({"request_id", "trace_id", "span_id", "peer", "client", "time", "message"})
"""Fields in which the same event may differ. So may all that are numbers."""


class _First(Struct, eq=False):
    """The one of the same events that was written."""

    level: LogLevel | None
    logger: str | None
    message: str
    ends: float
    repeats: int = 0


class Repeats:
    """Tells the first of the same events within a window from its repeats, whose number it gives afterwards."""

    def __init__(self, window: float = WINDOW_SECONDS, limit: int = LIMIT):
        """@param window: in seconds, from the first."""
        self._window = window
        self._limit = limit
        self._firsts: dict[int, _First] = {}  # the oldest first

    @property
    def due(self) -> float | None:
        """When `expired` next has something to tell, unless more comes."""
        return next((first.ends for first in self._firsts.values() if first.repeats), None)

    def seen(self, event: Event, now: float) -> Iterable[Event]:
        """What to write for this event: nothing if it is a repeat, else itself, after what is to be told of others."""
        if "log_io" in event:  # printed by somebody, a line each: they make sense only together
            return [event]
        events = self.expired(now)
        identity = _identity(event)
        first = self._firsts.get(identity)
        if first is not None:
            first.repeats += 1
            return events
        if len(self._firsts) >= self._limit:
            events += self._told(self._firsts.pop(next(iter(self._firsts))), now)
        text = message(event)[:_LONGEST_MESSAGE]
        self._firsts[identity] = _First(event.get("log_level"), event.get("log_namespace"), text, now + self._window)
        return [*events, event]

    def expired(self, now: float) -> list[Event]:
        """Forget what was first seen a window ago or more; how often each was repeated, if it was."""
        events: list[Event] = []
        while self._firsts:
            identity, first = next(iter(self._firsts.items()))
            if first.ends > now:
                break
            self._firsts.pop(identity, None)
            events += self._told(first, now)
        return events

    def ended(self, now: float) -> list[Event]:
        """Forget all of them; how often each was repeated, if it was."""
        firsts, self._firsts = self._firsts, {}
        return [event for first in firsts.values() for event in self._told(first, now)]

    def _told(self, first: _First, now: float) -> Iterator[Event]:
        if first.repeats:
            times = "once" if first.repeats == 1 else "{repeated} times"
            yield {
                "log_level": first.level,
                "log_namespace": first.logger,
                "log_format": f"repeated {times} within {{seconds:g}} s: {{log_repeated}}",
                "log_repeated": first.message,
                "repeated": first.repeats,
                "seconds": round(min(self._window, self._window - first.ends + now), 3),
            }


def _identity(event: Event) -> int:
    """A hash of what the same events have in common: all but times, ids and counts."""
    place: object
    failure = failure_of(event)
    if failure is None:
        said = event.get("log_template") or event.get("log_text") or event.get("log_format")
        place = tuple(
            (name, safe_str(value))
            for name, value in event.items()
            if name[:4] != "log_" and name not in _DIFFERENT and not isinstance(value, (int, float))
        )
    else:  # the same way to the same line with the same kind of error is the same bug, whatever its words
        said = event.get("log_format")
        place = failure.type, tuple(frame[1:3] for frame in failure.frames) or failure.getErrorMessage()
    return hash((event.get("log_level"), event.get("log_namespace"), said, place))
