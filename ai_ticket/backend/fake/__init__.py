"""A fake KoboldCPP 1.115: behaves on the wire as the real one was recorded to, and misbehaves as it is told to.

For tests, where it runs on a clock and over memory transports as well as on a reactor, and for trying AI Ticket out
without a GPU (`ai-ticket fake-backend`). What is real about it is held against recorded exchanges by the tests.

It needs nothing from the rest of the house, and nothing of the daemon needs it.
"""

from ai_ticket.backend.fake.engine import Settings
from ai_ticket.backend.fake.jobs import Pace
from ai_ticket.backend.fake.script import (
    BUSY,
    EMPTY,
    FAILED,
    LOADING,
    NOT_FOUND,
    NULL,
    RATE_LIMITED,
    SERVER_ERROR,
    SILENT_STREAM,
    UNAUTHORIZED,
    WEB_PAGE,
    Fault,
    Reply,
    Script,
)
from ai_ticket.backend.fake.server import FakeKobold, Seen

__all__ = [
    "BUSY",
    "EMPTY",
    "FAILED",
    "LOADING",
    "NOT_FOUND",
    "NULL",
    "RATE_LIMITED",
    "SERVER_ERROR",
    "SILENT_STREAM",
    "UNAUTHORIZED",
    "WEB_PAGE",
    "FakeKobold",
    "Fault",
    "Pace",
    "Reply",
    "Script",
    "Seen",
    "Settings",
]
