"""Who is let into the queue, whom that displaces, and when those who are not are to come back."""

import pytest
from simulation import World

from ai_ticket.errors import ApiServerError, DeadlineExceeded, Overloaded
from ai_ticket.event import Completion
from ai_ticket.interfaces import Client


class TestBounds:
    def test_a_full_queue(self) -> None:
        world = World(queue_limit=2)
        for number in range(4):
            world.submit(number)
        error = world.error(3)
        assert isinstance(error, Overloaded)
        assert error.details == "2 events are waiting"
        assert error.retry_after == 7, "two seconds each, as long as nothing was measured"
        assert world.recorder.outcomes == ["overloaded"]
        world.settle()

    def test_what_is_refused_from_its_head_is_counted(self) -> None:
        world = World(queue_limit=0)
        world.submit("first")
        with pytest.raises(Overloaded):
            world.check_room(Client("a", None, ""), 100)
        assert world.recorder.outcomes == ["overloaded"]
        world.settle()

    @pytest.mark.parametrize("slots", [1, 3])
    def test_a_queue_limit_of_nothing(self, slots: int) -> None:
        world = World(slots, queue_limit=0)
        for number in range(slots + 1):
            world.submit(number, settle=False)
        world.clock.advance(0)
        assert len(world.running) == slots
        assert world.kind(slots) is Overloaded
        world.settle()

    def test_a_free_slot_that_a_batch_waits_for_is_not_free(self) -> None:
        world = World(queue_limit=0)
        world.submit("batch", batch=True, settle=False)
        world.submit("question", "b")
        assert world.kind("question") is Overloaded
        assert world.running == ["batch"]
        world.settle()

    def test_batches_are_neither_counted_nor_refused(self) -> None:
        world = World(queue_limit=2)
        for number in range(50):
            world.submit(number, batch=True)
        world.submit("a")
        world.submit("b")
        assert world.pipeline.depth == 51
        assert not world.outcomes
        world.submit("c")
        assert world.kind("c") is Overloaded
        world.settle()

    def test_a_client_that_has_fewer_waiting_displaces_the_newest_of_the_one_that_has_most(self) -> None:
        world = World(queue_limit=4)
        for number in range(5):
            world.submit(number, "noisy")
        world.check_room(Client("quiet", None, ""), 100)
        assert not world.outcomes, "asking displaces nobody"
        world.submit("question", "quiet")
        error = world.error(4)
        assert isinstance(error, Overloaded)
        assert error.retry_after == 11, "five are before it"
        world.submit("another", "quiet")
        assert world.kind(3) is Overloaded
        world.submit("third", "quiet")
        assert world.kind("third") is Overloaded, "it would have more than the noisy one"
        world.submit("more", "noisy")
        assert world.kind("more") is Overloaded
        assert world.pipeline.depth == 4
        world.settle()

    def test_who_is_displaced_and_comes_back_at_once_does_not_get_beyond_the_limit(self) -> None:
        world = World(queue_limit=2)
        for number in range(3):
            world.submit(number, "noisy")
        world.submitted["2"].addCallback(lambda _: world.submit("again", "noisy", settle=False))
        world.submit("question", "quiet")
        assert world.kind("again") is Overloaded
        assert world.pipeline.depth == 2
        world.settle()


class TestForesight:
    """What can't be reached in time is refused at once."""

    @pytest.mark.parametrize("slots", [1, 3])
    @pytest.mark.parametrize("moment", [0.0, 0.75, 2.5])
    @pytest.mark.parametrize("timeout", [7.0, 10.0, 11.5])
    def test_refused_and_admitted_when_it_comes_back(self, slots: int, moment: float, timeout: float) -> None:
        world = World(slots, queue_limit=100, service_seconds=3.0)
        world.submit("first")
        world.run(3)
        for number in range(10 * slots):
            world.submit(number)
        world.run(moment)
        job = world.submit("refused", seconds=timeout)
        error = world.error("refused")
        assert isinstance(error, Overloaded)
        assert error.details is not None
        assert "deadline" in error.details
        assert job.began_at is None
        with pytest.raises(Overloaded) as asked:
            world.check_room(Client("a", None, ""), world.clock.seconds() + timeout)
        assert asked.value.retry_after == error.retry_after
        assert error.retry_after is not None
        assert error.retry_after >= 1
        assert error.retry_after % 1 == 0
        for tick in range(10_000):
            if world.pipeline.depth == 0:
                break
            came_back = world.clock.seconds()
            world.check_room(Client("other", None, ""), came_back + timeout)
            if tick == error.retry_after * 4:
                break
            world.run(0.25)
        job = world.submit("back", seconds=timeout)
        world.run(timeout)
        assert job.began_at is not None
        assert job.began_at <= came_back + timeout
        world.run(60)
        world.settle()

    def test_no_sooner_than_needed(self) -> None:
        world = World(queue_limit=100, service_seconds=3.0)
        world.submit("first")
        world.run(3)
        for number in range(10):
            world.submit(number)
        world.submit("refused", seconds=12)
        retry_after = world.error("refused").retry_after
        assert retry_after == 19, "its turn would come after 30 s, of which it has 12"
        world.run(17)
        world.submit("early", seconds=12)
        assert world.kind("early") is Overloaded
        world.run(60)
        world.settle()

    def test_another_client_is_not_refused(self) -> None:
        world = World(queue_limit=100, service_seconds=3.0)
        world.submit("first")
        world.run(3)
        for number in range(20):
            world.submit(number, "noisy")
        world.submit("refused", "noisy", seconds=10)
        world.submit("question", "quiet", seconds=10)
        assert world.kind("refused") is Overloaded
        world.run(10)
        assert world.kind("question") is Completion
        world.run(60)
        world.settle()

    def test_nothing_is_refused_by_guess(self) -> None:
        world = World(queue_limit=100)
        for number in range(100):
            world.submit(number, seconds=3)
        assert not world.outcomes
        world.run(4)
        world.settle()

    def test_failures_do_not_make_it_look_fast(self) -> None:
        world = World(queue_limit=100)
        world.submit("slow")
        world.clock.advance(10)
        world.finish("slow")
        for number in range(100):
            world.submit(number)
            world.finish(number, ApiServerError())
            world.submit(f"c{number}")
            world.cancel(f"c{number}")
        for number in range(5):
            world.submit(f"w{number}")
        world.submit("refused", seconds=30)
        assert world.kind("refused") is Overloaded
        world.settle()

    def test_what_its_deadline_cuts_counts_as_slow(self) -> None:
        world = World(queue_limit=100)
        world.submit("cut", seconds=60)
        world.clock.advance(60)
        world.finish("cut", DeadlineExceeded())
        world.submit(0)
        world.submit(1, seconds=10)
        assert world.kind(1) is Overloaded
        world.settle()

    def test_retry_after_of_a_full_queue_follows_the_measured_times(self) -> None:
        world = World(queue_limit=0)
        for number in range(30):
            world.submit(number)
            world.clock.advance(20)
            world.finish(number)
        world.submit(100)
        world.submit(101)
        assert world.error(101).retry_after == 21
        world.settle()
