"""Generations that their callers can ask after and stop by keys of their own: a pipeline around the pipeline."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from msgspec import Struct
from msgspec.structs import replace
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IPushProducer, IReactorTime

from ai_ticket.errors import ApiResponseFormatError
from ai_ticket.event import LONGEST_TEXT, Completion
from ai_ticket.interfaces import Client, Figures, Job, Pipeline, Sink

MOST_CLIENTS = 1000
"""Clients whose figures are kept; those who have not been here for longest are forgotten first."""


class _Past(Struct):
    """What a client has had so far, and when that ended."""

    figures: Figures
    ended: float


class _Generation:
    """One under way: a `Sink` that keeps the text, and hands it on where there is another sink."""

    def __init__(self, job: Job, clock: IReactorTime):
        self.key = job.event.key
        self.stopped = False
        self.first_text: float | None = None
        self._parts: list[str] = []
        self._size = 0
        self._sink: Sink | None = job.sink
        self._clock = clock
        self._working: Deferred[Completion] | None = None
        job.sink = self

    async def run(self, working: Deferred[Completion]) -> Completion:
        """Its end: also where it was told to stop, with what had come."""
        self._working = working
        try:
            completion = await working
        except CancelledError:
            if not self.stopped:
                raise
            completion = Completion("", "length", "", None)
        return completion if self._sink is not None else replace(completion, text=self.text)

    def stop(self) -> None:
        """End it here."""
        self.stopped = True
        if self._working is not None:
            self._working.cancel()

    @property
    def text(self) -> str:
        """What has come so far."""
        return "".join(self._parts)

    def write(self, text: str) -> None:
        """Some text has come.

        @raise ApiResponseFormatError: more than any model writes, which would fill the memory.
        """
        if self.first_text is None:
            self.first_text = self._clock.seconds()
        self._size += len(text)
        if self._size > LONGEST_TEXT:
            raise ApiResponseFormatError("the answer is too large")
        self._parts.append(text)
        if self._sink is not None:
            self._sink.write(text)

    def relay(self, chunks: bytes) -> None:
        """Some chunks have come: of these nothing is kept."""
        if self._sink is not None:
            self._sink.relay(chunks)

    def attach(self, producer: IPushProducer) -> None:
        """From here the text comes."""
        if self._sink is not None:
            self._sink.attach(producer)


class Keyed(Protocol):
    """What a client has under way and calls by a key of its own."""

    @property
    def key(self) -> str | None:
        """The key."""


K = TypeVar("K", bound=Keyed)


class UnderWay(Generic[K]):
    """What each client has under way."""

    def __init__(self) -> None:
        self._of: dict[str, list[K]] = {}

    @contextmanager
    def within(self, client: str, one: K) -> Iterator[None]:
        """Within this, it is under way."""
        own = self._of.setdefault(client, [])
        own.append(one)
        try:
            yield
        finally:
            own.remove(one)
            if not own:
                del self._of[client]

    def __contains__(self, client: object) -> bool:
        return client in self._of

    def find(self, client: str, key: str) -> list[K]:
        """Those of this key, the last at the end; without a key the only one, if it is that."""
        own = self._of.get(client, [])
        if key:
            return [one for one in own if one.key == key]
        return own[:] if len(own) == 1 else []


class Generations:
    """A `Pipeline` that remembers, of each client, the generations under way that have a key (`Event.key`)."""

    def __init__(self, pipeline: Pipeline, clock: IReactorTime, load: Callable[[], tuple[int, int]]):
        """@param load: how many events wait, and how many are under way."""
        self._pipeline = pipeline
        self._clock = clock
        self._load = load
        self._under_way = UnderWay[_Generation]()
        self._past: OrderedDict[str, _Past] = OrderedDict()

    # The pipeline.

    @property
    def batch_window(self) -> int:
        """How many events a batch is to offer at a time."""
        return self._pipeline.batch_window

    async def check_room(self, client: Client, deadline: float) -> None:
        """Whether an event of this client, submitted now, would be taken in."""
        await self._pipeline.check_room(client, deadline)

    def position(self, job: Job) -> int | None:
        """Which place in the queue it has."""
        return self._pipeline.position(job)

    async def submit(self, job: Job) -> Completion:
        """Wait for a slot and generate. One that is stopped ends as if the model had ended it, with what had come."""
        if job.event.key is None:
            return await self._pipeline.submit(job)
        client = job.client.key
        generation = _Generation(job, self._clock)
        with self._under_way.within(client, generation):
            completion = await generation.run(Deferred.fromCoroutine(self._pipeline.submit(job)))
        self._remember(client, generation, job, completion)
        return completion

    # What clients ask.

    async def text(self, client: str, key: str) -> str:
        """What has come so far of the last of this key."""
        found = self._under_way.find(client, key)
        return found[-1].text if found else ""

    async def stop(self, client: str, key: str) -> bool:
        """End those of this key, as if the model had stopped there."""
        found = self._under_way.find(client, key)
        for generation in found:
            generation.stop()
        return bool(found) or not (key or client in self._under_way)

    async def figures(self, client: str) -> Figures:
        """What has been going on."""
        queue, in_flight = self._load()
        past = self._past.get(client)
        if past is None:
            return Figures(queue, in_flight)
        return replace(past.figures, queue=queue, in_flight=in_flight, idle_seconds=self._clock.seconds() - past.ended)

    def _remember(self, client: str, generation: _Generation, job: Job, completion: Completion) -> None:
        now = self._clock.seconds()
        past = self._past.pop(client, None)
        begun = now if job.began_at is None else job.began_at
        first = generation.first_text or now
        usage = completion.usage
        figures = Figures(
            queue=0,
            in_flight=0,
            generations=1 if past is None else past.figures.generations + 1,
            prompt_tokens=0 if usage is None else usage.prompt_tokens,
            completion_tokens=0 if usage is None else usage.completion_tokens,
            prompt_seconds=first - begun,
            seconds=now - first,
            finish_reason=completion.finish_reason,
        )
        self._past[client] = _Past(figures, now)
        if len(self._past) > MOST_CLIENTS:
            self._past.popitem(last=False)
