"""Questions about a client's generations, and answers: a worker asks about those of all, the parent about the worker's.

They alone may carry text of an answer.
"""

from ai_ticket.interfaces import Figures
from ai_ticket.workers.message import Fault, Message


class AskText(Message, frozen=True):
    """What has come so far? `client`, `key`: as `interfaces.Generations` has them, here and below."""

    number: int
    client: str
    key: str


class AskStop(Message, frozen=True):
    """Let them end."""

    number: int
    client: str
    key: str


class AskFigures(Message, frozen=True):
    """What has been going on?"""

    number: int
    client: str


class Text(Message, frozen=True):
    """The answer to `AskText`."""

    number: int
    text: str


class AsWanted(Message, frozen=True):
    """The answer to `AskStop`."""

    number: int
    is_so: bool


class FiguresTold(Message, frozen=True):
    """The answer to `AskFigures`."""

    number: int
    figures: Figures


class Refused(Message, frozen=True):
    """Any of these can't be answered."""

    number: int
    fault: Fault


AboutGenerations = AskText | AskStop | AskFigures
AnswersAboutGenerations = Text | AsWanted | FiguresTold | Refused
