"""`ai-ticket check-config`: does the settings' checks of a start, and shows what is in force."""

import json
import os
import shlex
import sys
from argparse import Namespace
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ai_ticket import preflight
from ai_ticket.cli import console
from ai_ticket.cli.outcome import ExitStatus
from ai_ticket.environment import ConfigurationError, Loaded, load
from ai_ticket.settings import variables

MASK = "********"


def run(options: Namespace) -> ExitStatus:
    """Load and check, then show; exit status 1 if the service could not start like this."""
    loaded: Loaded | None = None
    warnings: list[str] = []
    try:
        loaded = load(os.environ)
        problems = preflight.problems(loaded.settings)
        warnings = [*loaded.warnings, *preflight.warnings(loaded)]
    except ConfigurationError as error:
        problems = error.problems
    if options.json:
        console.out(_as_json(loaded, warnings, problems))
    elif loaded is not None:
        _show(loaded)
    if not options.json:
        for warning in warnings:
            console.warn(warning)
    for problem in problems:
        console.say(f"error: {problem}")
    return ExitStatus.FAILED if problems else ExitStatus.OK


def _values(loaded: Loaded) -> dict[str, Any]:
    """The values by the names of their variables, secrets masked."""
    values = {name: getattr(loaded.settings, variable.field) for name, variable in variables().items()}
    return {name: MASK if value and variables()[name].secret else value for name, value in values.items()}


def _as_json(loaded: Loaded | None, warnings: list[str], problems: list[str]) -> str:
    settings = {}
    if loaded is not None:
        settings = {name: {"value": value, "source": loaded.sources[name]} for name, value in _values(loaded).items()}
    return json.dumps({"settings": settings, "warnings": warnings, "problems": problems}, ensure_ascii=False)


def _show(loaded: Loaded) -> None:
    rows = [(name, _text(value), loaded.sources[name]) for name, value in _values(loaded).items()]
    if not sys.stdout.isatty():
        for name, value, source in rows:
            console.out(f"{name}={shlex.quote(value) if value and value != MASK else value}  # {source}")
        return
    table = Table("setting", "value", "source", box=None, pad_edge=False)
    for name, value, source in rows:
        # Text, because a value may have brackets, which a str's markup would take for styles.
        cells = (Text(console.printable(cell), overflow="fold") for cell in (name, value, source))
        table.add_row(*cells, style="dim" if source == "default" else None)
    Console().print(table)


def _text(value: Any) -> str:
    """A value as it is written in the environment; empty where it is not set."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
