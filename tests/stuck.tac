"""The service in a process that has a thread which never ends."""

from pathlib import Path
from threading import Event

from twisted.internet import reactor

exec((Path(__file__).parent.parent / "ai_ticket.tac").read_text())
reactor.callWhenRunning(reactor.callInThread, Event().wait)
