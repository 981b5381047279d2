"""What commands write: results on stdout, everything said to a person on stderr."""

import re
import sys

from ai_ticket.cli.outcome import CommandError

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def out(text: str, *, end: str = "\n") -> None:
    """Write a result, or a piece of one, on stdout at once, byte for byte unless that is a terminal."""
    print(printable(text) if sys.stdout.isatty() else text, end=end, flush=True)


def say(text: str) -> None:
    """Write a line for a person on stderr."""
    print(printable(text), file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Write a warning on stderr."""
    say(f"warning: {text}")


def explain(error: CommandError) -> None:
    """Write on stderr what went wrong, and what can be done about it."""
    say(f"error: {error.code}: {error.message}")
    for line in (error.details or "").splitlines():
        say(f"  {line}")
    if error.request_id:
        say(f"  request id: {error.request_id}")
    if error.retry_after is not None:
        say(f"  try again in {error.retry_after} s")


def printable(text: str) -> str:
    """The text with its control characters spelt out: a model or a server may not drive the reader's terminal."""
    return _CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
