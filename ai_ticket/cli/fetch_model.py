"""`ai-ticket fetch-model`: brings the bundled model server's model onto this machine."""

from argparse import Namespace

from ai_ticket.backend import model
from ai_ticket.cli import console
from ai_ticket.cli.outcome import CommandError, ExitStatus


def run(options: Namespace) -> ExitStatus:
    """Fetch the model and print where it is."""
    try:
        path = model.fetch(console.say)
    except model.ModelError as error:
        raise CommandError("model_error", str(error))
    console.out(str(path))
    return ExitStatus.OK
