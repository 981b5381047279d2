"""`ai-ticket fake-backend`: a model server without a model, for trying things out."""

from argparse import Namespace
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import CannotListenError

from ai_ticket.backend.fake import FakeKobold, Settings
from ai_ticket.cli import console, reactor
from ai_ticket.cli.outcome import CommandError, ExitStatus


def run(options: Namespace) -> int:
    """Serve under a reactor of its own, until interrupted."""
    settings = Settings(
        tokens_per_second=options.tokens_per_second,
        first_token_seconds=options.first_token_seconds,
        context_length=options.context,
        multiuser=options.multiuser,
        password=options.password,
        text=options.text,
        echo=options.echo,
    )

    async def command(reactor: Any) -> ExitStatus:
        return await serve(reactor, FakeKobold(reactor, settings), options.host, options.port)

    return reactor.run(command)


async def serve(reactor: Any, fake: FakeKobold, host: str, port: int) -> ExitStatus:
    """Listen, say where, and serve until cancelled.

    @raise CommandError: can't listen there.
    """
    try:
        listening = reactor.listenTCP(port, fake, interface=host)
    except CannotListenError as error:
        reason = getattr(error.socketError, "strerror", None) or error.socketError
        raise CommandError("cannot_listen", f"Can't listen on {host}, port {port}: {reason}.")
    shown = f"[{host}]" if ":" in host else host
    console.out(f"http://{shown}:{listening.getHost().port}")
    console.say("A fake KoboldCPP is listening there; Ctrl-C ends it.")
    try:
        await Deferred()
    finally:
        fake.kill()
        await listening.stopListening()
    return ExitStatus.OK
