"""The command line, `ai-ticket`: for those who operate the daemon, and a small client of its HTTP interface.

May import `settings`, `environment`, `preflight`, `tokens`, and `backend.model`, `.sse` and `.fake`; nothing imports
it. The parser is all that loads at once: a command's module, and with it Twisted or rich, only when that command runs.
"""

import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from ai_ticket.cli import console
from ai_ticket.cli.arguments import parser
from ai_ticket.cli.outcome import CommandError, ExitStatus


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give its exit status; wrong usage exits at once, as argparse does."""
    options = parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a completion must come out whatever the terminal's character set
            stream.reconfigure(errors="backslashreplace")
    try:
        return int(import_module(options.module).run(options))
    except KeyboardInterrupt:
        return ExitStatus.INTERRUPTED
    except CommandError as error:
        return _report(error, as_json=getattr(options, "json", False))
    except BrokenPipeError:
        # The reader of our output has gone. Without this the interpreter would try to flush it once more, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitStatus.FAILED
    except Exception as error:
        unforeseen = CommandError("internal_error", f"{type(error).__name__}: {error}")
        return _report(unforeseen, as_json=getattr(options, "json", False))


def _report(error: CommandError, *, as_json: bool) -> ExitStatus:
    console.explain(error)
    if as_json:
        console.out(error.to_json())
    return error.status
