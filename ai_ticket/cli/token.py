"""`ai-ticket token`: makes an access token and adds it to the token file."""

import hashlib
import os
import secrets
import stat
from argparse import Namespace
from pathlib import Path

from ai_ticket.cli import console, partial_settings
from ai_ticket.cli.outcome import CommandError, ExitStatus
from ai_ticket.cli.token_file import NameTaken, store
from ai_ticket.environment import ConfigurationError
from ai_ticket.tokens import HASH_PREFIX, Line

DEFAULT_FILE = "ops/secrets/ai_ticket_auth_token.txt"


def run(options: Namespace) -> ExitStatus:
    """Make the token, store it, then print it."""
    configured = _configured_file(must_be_readable=options.file is None)
    path = Path(options.file or configured or DEFAULT_FILE)
    token = secrets.token_urlsafe(32)
    credential = HASH_PREFIX + hashlib.sha256(token.encode()).hexdigest() if options.hash else token
    parameters = None if options.weight is None else f"weight={options.weight}"
    try:
        replaced = store(path, Line(credential, options.name, parameters), replace=options.replace)
        mode = stat.S_IMODE(path.stat().st_mode)
    except NameTaken:
        raise CommandError(
            "name_taken", f"{path} has a token named {options.name}.", details="--replace puts a new one in its place"
        )
    except OSError as error:
        raise CommandError("token_file_error", f"{path} can't be written: {error.strerror or error}")

    console.say(f"{options.name}: token {'replaced' if replaced else 'added'} in {path}")
    if options.hash:
        console.say("Only its SHA-256 was kept: this is the one time that the token is shown.")
    if mode & 0o077:
        console.warn(f"{path} may be read or written by others than its owner (mode {mode:04o})")
    if configured is None or Path(configured).absolute() != path.absolute():
        console.say(f"For the service to read it, set AI_TICKET_AUTH_TOKEN_FILE={path}")
    else:
        console.say(
            "A service that runs accepts it within AI_TICKET_AUTH_TOKEN_RELOAD_INTERVAL, or at once after SIGHUP."
        )
    console.out(token)
    return ExitStatus.OK


def _configured_file(*, must_be_readable: bool) -> str | None:
    try:
        return partial_settings.read(os.environ, {"AI_TICKET_AUTH_TOKEN_FILE"}).ai_ticket_auth_token_file
    except ConfigurationError as error:
        if must_be_readable:
            raise CommandError("configuration_error", "The settings can't be read.", details="\n".join(error.problems))
        return None
