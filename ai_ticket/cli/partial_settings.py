"""The few settings that a command needs, read so that no other setting can stand in its way.

A client, or whoever makes the first token, need not have a configuration that the daemon could start with.
"""

from collections.abc import Collection, Mapping

from ai_ticket.environment import FILE_TWINS, load
from ai_ticket.settings import Settings, variables


def read(environ: Mapping[str, str], wanted: Collection[str]) -> Settings:
    """Read the wanted variables from the environment and its file; the others are as if unset.

    @raise ConfigurationError: one of them can't be used, or the environment file can't be read.
    """
    # An empty value counts as unset and the environment wins over the file, so this blanks a variable in both.
    others = {name: "" for name in (*variables(), *FILE_TWINS) if name not in wanted}
    # Off, because being without a token is the daemon's problem.
    return load({**environ, **others, "AI_TICKET_AUTH": "off"}).settings
