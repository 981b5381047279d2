"""The sign that something is still going on, for a person who waits."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn


@contextmanager
def waiting(description: str) -> Iterator[None]:
    """Show a spinner and the seconds elapsed on stderr, if that is a terminal, while the body runs."""
    if not sys.stderr.isatty():
        yield
        return
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description} {task.elapsed:.0f} s", markup=False),
        console=Console(stderr=True),
        transient=True,
        # stdout carries the completion and nothing else: it is none of the spinner's business.
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with progress:
        progress.add_task(description, total=None)
        yield
