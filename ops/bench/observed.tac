"""The daemon, for observers: from SIGUSR1 on it notes what it is at, and at the next it writes that into `profile`.

That is by the clock of its own CPU, some 250 times a second of it, as a JSON array of [file, line, function, count].
SIGUSR2 writes into the file `delayed` how many delayed calls it has.
"""

import json
import signal
from collections import Counter
from pathlib import Path

from twisted.application.service import Application
from twisted.internet import reactor

from ai_ticket.tap import Options, makeService

SECONDS = 0.004
seen = Counter()


def note(_, frame):
    """The function that this SIGPROF came into."""
    code = frame.f_code
    seen[code.co_filename, code.co_firstlineno, code.co_qualname] += 1


def profile(*_):
    """Begin, or end."""
    if not signal.getitimer(signal.ITIMER_PROF)[1]:
        signal.setitimer(signal.ITIMER_PROF, SECONDS, SECONDS)
        return
    signal.setitimer(signal.ITIMER_PROF, 0)
    Path("profile.part").write_text(json.dumps([[*where, count] for where, count in seen.items()]))
    Path("profile.part").rename("profile")
    seen.clear()


def tell(*_):
    """Count them, in the reactor's turn."""
    reactor.callFromThread(lambda: Path("delayed").write_text(f"{len(reactor.getDelayedCalls())}\n"))


def listen():
    """Once the reactor has set up its own signals."""
    signal.signal(signal.SIGPROF, note)
    signal.signal(signal.SIGUSR1, profile)
    signal.signal(signal.SIGUSR2, tell)


application = Application("ai-ticket")
makeService(Options()).setServiceParent(application)
reactor.callWhenRunning(listen)
