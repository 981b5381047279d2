"""A pipeline that is to be empty by some time: what can't be is refused, and nothing else."""

from simulation import World

from ai_ticket.errors import ShuttingDown


def learnt(world: World, seconds: float) -> World:
    """This world, once the pipeline knows that an event takes so long."""
    world.submit("first")
    world.clock.advance(seconds)
    world.finish("first")
    return world


def refused(world: World) -> list[str]:
    return [name for name, outcome in world.outcomes.items() if isinstance(outcome, ShuttingDown)]


def test_those_whose_answer_would_come_too_late_are_refused_at_once() -> None:
    world = learnt(World(slots=2), 10)
    for number in range(8):
        world.submit(number, client="ab"[number % 2])
    world.pipeline.drain(world.clock.seconds() + 25)
    assert refused(world) == ["4", "5", "6", "7"], "two of three rounds of ten seconds fit"
    assert world.error("4").retry_after == 5
    assert world.running == ["0", "1"]
    world.settle()
    assert refused(world) == ["4", "5", "6", "7"]


def test_time_that_is_enough_for_all() -> None:
    world = learnt(World(), 10)
    for number in range(3):
        world.submit(number)
    world.pipeline.drain(world.clock.seconds() + 30)
    world.settle()
    assert refused(world) == []


def test_those_behind_what_takes_longer_than_thought_are_refused_when_that_shows() -> None:
    world = learnt(World(), 1)
    for number in range(4):
        world.submit(number)
    world.pipeline.drain(world.clock.seconds() + 20)
    assert refused(world) == []
    world.clock.advance(15)
    world.finish(0)
    assert refused(world) == ["2", "3"], "3.8 s are thought to be what an event takes, and 5 s are left"
    world.settle()


def test_as_long_as_nobody_knows_what_an_event_takes_none_is_refused() -> None:
    world = World()
    for number in range(3):
        world.submit(number)
    world.pipeline.drain(world.clock.seconds() + 0.5)
    assert refused(world) == []
    world.clock.advance(0.4)
    world.finish(0)
    assert refused(world) == ["1", "2"]
    world.settle()


def test_events_of_batches_that_have_not_begun_are_refused() -> None:
    """Also those that come later; one that came before, and whose body was still being read, is let in."""
    world = World()
    world.submit("begun", batch=True)
    world.submit("waits", batch=True)
    world.submit("asks")
    world.pipeline.drain(world.clock.seconds() + 100)
    world.submit("comes", batch=True)
    world.submit("asks late")
    assert refused(world) == ["waits", "comes"]
    world.settle()
    assert refused(world) == ["waits", "comes"]


def test_who_comes_too_late_is_refused_without_having_begun() -> None:
    world = learnt(World(), 10)
    world.pipeline.drain(world.clock.seconds() + 9)
    world.submit(0)
    assert refused(world) == ["0"]
    world.settle()
    assert len(world.recorder.began) == 1


def test_an_event_that_is_refused_may_take_another_with_it() -> None:
    """As when a batch, or a caller, gives up all that it has."""
    world = learnt(World(queue_limit=100), 10)
    for number in range(4):
        world.submit(number)
    world.submitted["2"].addBoth(lambda _: world.cancel(3))
    world.pipeline.drain(world.clock.seconds() + 20)
    assert refused(world) == ["2"]
    assert set(world.outcomes) == {"first", "2", "3"}
    world.settle()
