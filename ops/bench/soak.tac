"""The daemon, which on SIGUSR2 writes into the file `delayed` how many delayed calls it has."""

import signal
from pathlib import Path

from twisted.application.service import Application
from twisted.internet import reactor

from ai_ticket.tap import Options, makeService


def tell(*_):
    """Count them, in the reactor's turn."""
    reactor.callFromThread(lambda: Path("delayed").write_text(f"{len(reactor.getDelayedCalls())}\n"))


application = Application("ai-ticket")
makeService(Options()).setServiceParent(application)
reactor.callWhenRunning(lambda: signal.signal(signal.SIGUSR2, tell))
