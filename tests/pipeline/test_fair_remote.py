"""What holds for the pipeline holds as well for who sees it from a worker process."""

from collections.abc import Coroutine
from typing import Any

import pytest
import simulation
import test_fair
import test_fair_drain
from linked import Told, Worker, make_office, relayed
from twisted.internet.interfaces import IPushProducer

from ai_ticket.event import Completion
from ai_ticket.interfaces import Client, Job
from ai_ticket.pipeline.fair import FairPipeline


class Unheard:
    """A `Sink` whose text nobody wants."""

    def write(self, text: str) -> None:
        pass

    def attach(self, producer: IPushProducer) -> None:
        pass


class FromAWorker:
    """A pipeline whose seam is the worker's, and the rest the parent's."""

    def __init__(self, pipeline: FairPipeline, worker: Worker) -> None:
        self._pipeline = pipeline
        self._remote = worker.pipeline
        self._link = worker.link

    @property
    def batch_window(self) -> int:
        return self._remote.batch_window

    def submit(self, job: Job) -> Coroutine[Any, Any, Completion]:
        if job.sink is None:
            job.sink = Unheard()  # such callers are told their places
        return self._remote.submit(job)

    def check_room(self, client: Client, deadline: float) -> Coroutine[Any, Any, None]:
        return self._remote.check_room(client, deadline)

    def position(self, job: Job) -> int | None:
        self._link.tell_places()
        return self._remote.position(job)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)


class World(simulation.World):
    """The same with a parent and a worker."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        crew = Told()
        actual: FairPipeline = self.pipeline
        actual._backend = relayed(self.backend, crew)
        office = make_office(self.clock, actual, crew)
        self.worker = Worker(office, crew, self.clock, [self.backend])
        self.pipeline = FromAWorker(actual, self.worker)  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def from_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (test_fair, test_fair_drain):
        monkeypatch.setattr(module, "World", World)


globals().update(
    {
        f"{name}_remote": found
        for module in (test_fair, test_fair_drain)
        for name, found in vars(module).items()
        if name.startswith(("test_", "Test")) and not hasattr(found, "hypothesis")
    }
)
