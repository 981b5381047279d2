"""Clients' generations, asked after and stopped across processes: a question may reach another worker than its subject.

A worker asks the parent, which knows who has what, and asks those workers.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace
from twisted.internet.defer import Deferred, DeferredLock, gatherResults
from twisted.logger import Logger

from ai_ticket.errors import DomainError, InternalError, Overloaded
from ai_ticket.interfaces import Figures, Generations
from ai_ticket.pipeline.generations import UnderWay
from ai_ticket.workers.channel import Questions
from ai_ticket.workers.message import Fault, Handlers, Message
from ai_ticket.workers.messages_of_generations import (
    AboutGenerations,
    AskFigures,
    AskStop,
    AskText,
    AsWanted,
    FiguresTold,
    Refused,
    Text,
)

LONGEST_TOLD = 1_048_576
"""Characters of a text that is told across processes; no context of today's models holds so many."""

MOST_ASKING = 64
"""Who may wait for texts through one channel, where one is on its way at a time."""

BUSY_SECONDS = 1.0

_NOTHING = nullcontext()
_log = Logger()
_Told = TypeVar("_Told")


class LinkLost(Exception):
    """The worker is gone."""


class RemoteGenerations:
    """The `Generations` at the other end of a channel. All of it raises `LinkLost` where that is closed."""

    def __init__(self, questions: Questions):
        self._questions = questions
        self._one_text = DeferredLock()

    async def text(self, client: str, key: str) -> str:
        """What has come so far.

        @raise Overloaded: too many ask, or the text is longer than any.
        """
        if len(self._one_text.waiting) >= MOST_ASKING:
            raise Overloaded("too many ask for texts", retry_after=BUSY_SECONDS)
        async with self._one_text:
            found: str = await self._questions.ask(lambda number: AskText(number, client, key))
        return found

    async def stop(self, client: str, key: str) -> bool:
        """End those of this key."""
        is_so: bool = await self._questions.ask(lambda number: AskStop(number, client, key))
        return is_so

    async def figures(self, client: str) -> Figures:
        """What has been going on."""
        found: Figures = await self._questions.ask(lambda number: AskFigures(number, client))
        return found


def taking_answers(questions: Questions) -> Handlers:
    """What takes the answers to questions of `RemoteGenerations`."""
    return {
        Text: lambda message: questions.answered(message.number, message.text),
        AsWanted: lambda message: questions.answered(message.number, message.is_so),
        FiguresTold: lambda message: questions.answered(message.number, message.figures),
        Refused: lambda message: questions.refused(message.number, message.fault.error()),
    }


def answering(generations: Generations, send: Callable[[Message], None]) -> Handlers:
    """What takes the questions of a `RemoteGenerations` at the other end, and has these answer."""

    def begin(question: AboutGenerations) -> None:
        Deferred.fromCoroutine(_answer(question, generations, send)).addErrback(
            lambda failure: _log.failure("a question of another process gets no answer", failure)
        )

    return dict.fromkeys((AskText, AskStop, AskFigures), begin)


async def _answer(question: AboutGenerations, generations: Generations, send: Callable[[Message], None]) -> None:
    number = question.number
    try:
        if isinstance(question, AskText):
            text = await generations.text(question.client, question.key)
            if len(text) > LONGEST_TOLD:
                raise Overloaded("the text is too long to be told")
            send(Text(number, text))
        elif isinstance(question, AskStop):
            send(AsWanted(number, await generations.stop(question.client, question.key)))
        else:
            send(FiguresTold(number, await generations.figures(question.client)))
    except DomainError as error:
        send(Refused(number, Fault.of(error)))
    except Exception:
        send(Refused(number, Fault.of(InternalError())))
        raise


class _Owned(Struct, eq=False):
    """A generation under way, and whose it is."""

    key: str
    owner: Generations


class GenerationsOfAll:
    """The `Generations` of all workers, as the parent has them."""

    def __init__(self, load: Callable[[], tuple[int, int]], owners: Callable[[], list[Generations]]):
        """@param load: how many events wait, and how many are under way. @param owners: those of each worker."""
        self._load = load
        self._owners = owners
        self._under_way = UnderWay[_Owned]()

    def under_way(self, client: str, key: str | None, owner: Generations) -> AbstractContextManager[None]:
        """Within this a client's generation is under way, which has this key, if any."""
        return _NOTHING if key is None else self._under_way.within(client, _Owned(key, owner))

    async def text(self, client: str, key: str) -> str:
        """What has come so far of the last of this key."""
        found = self._under_way.find(client, key)
        return await _unless_gone(found[-1].owner.text(client, key), "") if found else ""

    async def stop(self, client: str, key: str) -> bool:
        """End those of this key, wherever they are."""
        owners = list(dict.fromkeys(owned.owner for owned in self._under_way.find(client, key)))
        if not owners:
            return not (key or client in self._under_way)
        stopped = await _all([_unless_gone(owner.stop(client, key), False) for owner in owners])
        return any(stopped)

    async def figures(self, client: str) -> Figures:
        """What has been going on, in all of them."""
        queue, in_flight = self._load()
        nothing = Figures(queue, in_flight)
        told = await _all([_unless_gone(owner.figures(client), nothing) for owner in self._owners()])
        past = [figures for figures in told if figures.generations]
        last = min(past, key=lambda figures: figures.idle_seconds, default=nothing)
        total = sum(figures.generations for figures in past)
        return replace(last, queue=queue, in_flight=in_flight, generations=total)


async def _unless_gone(asking: Awaitable[_Told], otherwise: _Told) -> _Told:
    try:
        return await asking
    except LinkLost:
        return otherwise


async def _all(asking: "list[Awaitable[_Told]]") -> "list[_Told]":
    return await gatherResults([Deferred.fromCoroutine(each) for each in asking])  # type: ignore[arg-type]
