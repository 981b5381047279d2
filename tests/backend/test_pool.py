"""Several backends as one: routing, failover, busy servers, circuits, cancellation; and that nothing is ever lost."""

from collections import Counter
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from harness import COMPLETION
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from ai_ticket.backend.circuit import CONSECUTIVE_FAILURES, CircuitState
from ai_ticket.backend.pool import Pool
from ai_ticket.backend.prober import Prober
from ai_ticket.backend.retry import FLOOR, make_retry_policy
from ai_ticket.errors import (
    ApiAuthenticationError,
    ApiClientError,
    ApiConnectionError,
    ApiEndpointMissing,
    ApiRateLimited,
    ApiServerError,
    ContextLengthExceeded,
    DeadlineExceeded,
    DomainError,
    NoBackendAvailable,
)
from ai_ticket.event import Completion, Event, Message, Parameters
from ai_ticket.interfaces import BackendState, Sink
from ai_ticket.spans import NO_SPAN, Span


class Server:
    """A `Backend` in memory. Attempts wait in `running` for the test, or `behave` answers each at once."""

    def __init__(self, name: str, slots: int = 1) -> None:
        self.state = BackendState(name=name, up=True, slots=slots)
        self.running: list[Deferred[Completion]] = []
        self.taken: list[str] = []
        self.sinks: list[Sink | None] = []
        self.most = 0
        self.behave: Callable[[], Completion | DomainError] | None = None
        self.healthy = True

    async def complete(
        self, event: Event, deadline: float, sink: Sink | None = None, span: Span = NO_SPAN
    ) -> Completion:
        self.taken.append(event.prompt)
        self.sinks.append(sink)
        if self.behave is not None:
            result = self.behave()
            if isinstance(result, DomainError):
                raise result
            return result
        answer: Deferred[Completion] = Deferred()
        self.running.append(answer)
        self.most = max(self.most, len(self.running))
        try:
            return await answer
        except ApiConnectionError:
            self.state = replace(self.state, up=False)
            raise
        finally:
            self.running.remove(answer)

    async def probe(self) -> BackendState:
        self.state = replace(self.state, up=self.healthy)
        return self.state

    def finish(self, number: int = 0) -> None:
        self.running[number].callback(COMPLETION)

    def fail(self, error: Exception, number: int = 0) -> None:
        self.running[number].errback(error)


class World:
    """A pool of such servers on a clock; `outcomes` has what became of each event."""

    def __init__(self, *ranks: list[Server], jitter: float = 1.0, max_attempts: int = 3, silence: bool = False):
        self.clock = Clock()
        self.servers = [server for rank in ranks for server in rank]
        policy = make_retry_policy(max_attempts=max_attempts, silence_is_curable=silence, random=lambda: jitter)
        self.pool = Pool(ranks, clock=self.clock, random=lambda: jitter, policy=policy)
        self.submitted: list[Deferred[Any]] = []
        self.outcomes: dict[int, list[Any]] = {}

    def submit(self, seconds: float = 100, sink: Sink | None = None) -> int:
        number = len(self.submitted)
        event = Event([Message("user", str(number))], Parameters(max_tokens=5))
        self.outcomes[number] = []
        submitted = Deferred.fromCoroutine(self.pool.complete(event, self.clock.seconds() + seconds, sink))
        self.submitted.append(submitted)
        submitted.addCallbacks(lambda done: done, lambda failure: failure.value).addCallback(
            self.outcomes[number].append
        )
        return number

    def outcome(self, number: int) -> Any:
        [found] = self.outcomes[number]
        return found

    def circuit(self, number: int) -> CircuitState:
        return self.pool.members[number].circuit.state

    def open(self, number: int) -> None:
        """Open the circuit of one server."""
        circuit = self.pool.members[number].circuit
        while circuit.state is not CircuitState.OPEN:
            circuit.failed(circuit.enter())

    def settle(self) -> None:
        """Let go all that is under way, and let all time pass."""
        for _ in range(1000):
            for server in self.servers:
                while server.running:
                    server.finish()
            if not self.clock.getDelayedCalls():
                break
            self.clock.advance(1)
        assert all(len(found) == 1 for found in self.outcomes.values())
        assert not self.clock.getDelayedCalls()
        assert [member.running for member in self.pool.members] == [0] * len(self.servers)


class TestRouting:
    def test_the_preferred_rank_first_then_its_standby(self) -> None:
        preferred, standby = Server("a:1", 2), Server("b:1", 2)
        world = World([preferred], [standby])
        for _ in range(5):
            world.submit()
        assert (preferred.taken, standby.taken) == (["0", "1"], ["2", "3"])
        preferred.finish()
        assert preferred.taken == ["0", "1", "4"]
        world.settle()

    def test_the_least_busy_of_equals_by_the_share_of_its_slots(self) -> None:
        small, large = Server("a:1", 2), Server("b:1", 4)
        world = World([small, large])
        for _ in range(6):
            world.submit()
        assert (len(small.running), len(large.running)) == (2, 4)
        small.finish()
        for _ in range(3):
            large.finish()
        world.submit()
        assert len(large.running) == 2, "a quarter of the large one's slots was taken, and half of the small one's"
        world.settle()

    def test_equals_that_are_equally_busy_take_turns(self) -> None:
        servers = [Server(f"s:{number}") for number in range(3)]
        world = World(servers)
        for _ in range(9):
            world.submit()
            [busy] = [server for server in servers if server.running]
            busy.finish()
        assert [len(server.taken) for server in servers] == [3, 3, 3]

    def test_slots_that_a_probe_learns_are_used_at_once(self) -> None:
        server = Server("a:1", 1)
        world = World([server])
        for _ in range(4):
            world.submit()
        server.state = replace(server.state, slots=3)
        Deferred.fromCoroutine(world.pool.members[0].probe())
        assert len(server.running) == 3
        server.state = replace(server.state, slots=1)
        server.finish()
        assert len(server.running) == 2, "fewer slots now: none is filled again"
        world.settle()

    def test_a_backend_that_is_down_is_spared_while_another_is_up(self) -> None:
        preferred, standby = Server("a:1"), Server("b:1")
        preferred.state = replace(preferred.state, up=False)
        world = World([preferred], [standby])
        for _ in range(2):
            world.submit()
        assert (len(preferred.taken), len(standby.taken)) == (0, 1)
        world.settle()

    def test_backends_of_which_nothing_is_known_yet_are_used(self) -> None:
        servers = [Server("a:1"), Server("b:1")]
        for server in servers:
            server.state = replace(server.state, up=False)
        world = World([servers[0]], [servers[1]])
        world.submit()
        world.submit()
        assert [len(server.running) for server in servers] == [1, 1]
        world.settle()

    def test_events_wait_in_order(self) -> None:
        server = Server("a:1")
        world = World([server])
        for _ in range(4):
            world.submit()
        for _ in range(4):
            server.finish()
        assert server.taken == ["0", "1", "2", "3"]
        world.settle()

    def test_the_sink_is_handed_on(self) -> None:
        server = Server("a:1")
        world = World([server])
        sink: Any = object()
        world.submit(sink=sink)
        assert server.sinks == [sink]
        world.settle()

    def test_the_pool_as_one_backend(self) -> None:
        servers = [Server("a:1", 2), Server("b:1", 3)]
        pool = World([servers[0]], [servers[1]]).pool
        assert (pool.slots, pool.state.slots, pool.state.up) == (5, 5, True)
        assert [state.name for state in pool.states] == ["a:1", "b:1"]
        servers[0].healthy = servers[1].healthy = False
        Deferred.fromCoroutine(pool.probe())
        assert not pool.state.up


class TestFailover:
    def test_a_retry_goes_elsewhere_at_once(self) -> None:
        servers = [Server("a:1"), Server("b:1")]
        world = World([servers[0]], [servers[1]])
        world.submit()
        servers[0].fail(ApiServerError())
        world.clock.advance(0)
        assert [len(server.running) for server in servers] == [0, 1]
        world.settle()
        assert world.outcome(0) is COMPLETION

    def test_a_retry_waits_for_another_backend_rather_than_go_back(self) -> None:
        servers = [Server("a:1"), Server("b:1")]
        world = World([servers[0]], [servers[1]])
        world.submit()
        world.submit()
        servers[0].fail(ApiServerError())
        world.clock.advance(4)
        assert servers[0].taken == ["0"]
        servers[1].finish()
        assert servers[1].taken == ["1", "0"]
        world.settle()

    @pytest.mark.parametrize("kind", [ApiServerError, ApiRateLimited])
    def test_but_not_for_ever(self, kind: type[DomainError]) -> None:
        """The one that failed may be well again, and the other one busy for minutes."""
        servers = [Server("a:1"), Server("b:1")]
        world = World([servers[0]], [servers[1]])
        world.submit()
        world.submit()
        servers[0].fail(kind())
        world.clock.advance(5.1)
        assert servers[0].taken == ["0", "0"]
        world.settle()

    @pytest.mark.parametrize("kind", [ApiAuthenticationError, ApiEndpointMissing])
    def test_what_only_another_backend_can_cure(self, kind: type[DomainError]) -> None:
        servers = [Server("a:1"), Server("b:1")]
        world = World([servers[0]], [servers[1]])
        world.submit()
        servers[0].fail(kind())
        world.clock.advance(0)
        assert servers[1].running
        servers[1].fail(kind())
        assert isinstance(world.outcome(0), kind)
        assert servers[0].taken == ["0"]
        world.settle()

    def test_a_retry_on_the_same_backend_waits_out_the_back_off(self) -> None:
        server = Server("a:1")
        world = World([server])
        world.submit()
        server.fail(ApiServerError())
        world.clock.advance(0.2)
        assert not server.running
        world.clock.advance(0.1)
        assert server.running
        world.settle()

    def test_the_last_error_is_the_answer_when_the_attempts_are_used_up(self) -> None:
        servers = [Server("a:1"), Server("b:1")]
        errors = [ApiServerError("1"), ApiConnectionError("2"), ApiServerError("3")]
        world = World([servers[0]], [servers[1]])
        world.submit()
        for error in errors:
            [busy] = [server for server in servers if server.running]
            busy.fail(error)
            world.clock.advance(1)
        assert world.outcome(0) is errors[2]
        world.settle()

    @pytest.mark.parametrize("kind", [ApiClientError, ContextLengthExceeded])
    def test_what_another_attempt_cannot_cure_is_told_at_once(self, kind: type[DomainError]) -> None:
        servers = [Server("a:1"), Server("b:1")]
        world = World([servers[0]], [servers[1]])
        world.submit()
        servers[0].fail(kind())
        assert isinstance(world.outcome(0), kind)
        assert not servers[1].taken
        world.settle()

    def test_after_the_first_token_there_is_no_retry(self) -> None:
        servers = [Server("a:1"), Server("b:1")]
        world = World([servers[0]], [servers[1]])
        world.submit()
        error = ApiConnectionError()
        error.after_first_token = True
        servers[0].fail(error)
        assert world.outcome(0) is error
        assert not servers[1].taken
        world.settle()

    def test_no_retry_that_would_begin_past_the_deadline(self) -> None:
        server = Server("a:1")
        world = World([server])
        world.submit(seconds=1.1)
        world.clock.advance(1)
        server.fail(ApiServerError())
        assert isinstance(world.outcome(0), ApiServerError)
        world.settle()

    def test_a_silent_backend_with_a_time_out_of_its_own(self) -> None:
        servers = [Server("a:1"), Server("b:1")]
        world = World([servers[0]], [servers[1]], silence=True)
        world.submit()
        world.clock.advance(10)
        servers[0].fail(DeadlineExceeded())
        world.clock.advance(0)
        assert servers[1].running
        world.settle()

    def test_a_bug_is_no_failure_of_the_backend(self) -> None:
        server = Server("a:1")
        world = World([server])
        for _ in range(20):
            number = world.submit()
            server.fail(RuntimeError("a bug"))
            assert isinstance(world.outcome(number), RuntimeError)
        assert world.circuit(0) is CircuitState.CLOSED
        world.settle()


class TestBusy:
    def test_a_busy_backend_is_no_failed_one(self) -> None:
        """No circuit opens and no budget is used, however often."""
        servers = [Server("a:1"), Server("b:1")]
        servers[0].behave = ApiRateLimited
        servers[1].behave = lambda: COMPLETION
        world = World(servers)
        for _ in range(200):
            number = world.submit()
            world.clock.advance(1)
            assert world.outcome(number) is COMPLETION
        assert world.circuit(0) is CircuitState.CLOSED
        world.settle()

    def test_a_busy_backend_is_left_in_peace_for_a_moment(self) -> None:
        servers = [Server("a:1", 4), Server("b:1", 4)]
        servers[0].behave = lambda: ApiRateLimited(retry_after=2)
        servers[1].behave = lambda: COMPLETION
        world = World(servers)
        for _ in range(20):
            world.submit()
            world.clock.advance(0)
        assert len(servers[0].taken) == 1
        world.clock.advance(2)
        world.submit()
        world.submit()
        assert len(servers[0].taken) == 2
        world.settle()

    def test_where_the_last_attempt_was_busy_the_caller_is_told_so(self) -> None:
        servers = [Server("a:1"), Server("b:1")]
        for server in servers:
            server.behave = lambda: ApiRateLimited(retry_after=1)
        world = World([servers[0]], [servers[1]])
        number = world.submit()
        world.clock.advance(0)
        assert [len(server.taken) for server in servers] == [1, 1]
        assert not world.outcomes[number], "the third attempt waits until there may be room"
        world.clock.pump([0.5] * 6)
        assert isinstance(world.outcome(number), ApiRateLimited)
        assert sum(len(server.taken) for server in servers) == 3
        world.settle()

    def test_waiting_for_a_slot_after_a_busy_answer_until_the_deadline(self) -> None:
        servers = [Server("a:1"), Server("b:1")]
        world = World([servers[0]], [servers[1]])
        world.submit()
        world.submit()
        servers[0].finish()
        servers[0].behave = ApiRateLimited
        number = world.submit(seconds=10)
        assert servers[0].taken == ["0", "2"]
        world.clock.pump([0.5] * 19)
        assert not world.outcomes[number]
        world.clock.advance(0.5)
        assert isinstance(world.outcome(number), ApiRateLimited)
        world.settle()

    def test_busy_uses_an_attempt(self) -> None:
        server = Server("a:1")
        server.behave = ApiRateLimited
        world = World([server])
        world.submit()
        world.clock.pump([0.5] * 20)
        assert len(server.taken) == 3
        world.settle()


class TestCircuit:
    def test_every_circuit_open(self) -> None:
        servers = [Server("a:1"), Server("b:1")]
        world = World([servers[0]], [servers[1]])
        world.open(0)
        world.open(1)
        number = world.submit()
        error = world.outcome(number)
        assert isinstance(error, NoBackendAvailable)
        assert 0 < error.retry_after <= 1
        assert not servers[0].taken
        world.settle()

    def test_it_can_be_known_before(self) -> None:
        servers = [Server("a:1"), Server("b:1")]
        world = World([servers[0]], [servers[1]])
        world.open(0)
        world.pool.check()
        world.open(1)
        with pytest.raises(NoBackendAvailable) as refused:
            world.pool.check()
        assert refused.value.retry_after is not None
        world.clock.advance(refused.value.retry_after)
        world.pool.check()
        world.settle()

    def test_those_who_wait_are_told_when_the_last_circuit_opens(self) -> None:
        server = Server("a:1")
        world = World([server], max_attempts=1)
        waiting = [world.submit() for _ in range(CONSECUTIVE_FAILURES + 3)]
        for _ in range(CONSECUTIVE_FAILURES):
            server.fail(ApiServerError())
        found = [type(world.outcome(number)) for number in waiting]
        assert found == [ApiServerError] * CONSECUTIVE_FAILURES + [NoBackendAvailable] * 3
        world.settle()

    def test_who_has_tried_is_told_what_failed(self) -> None:
        server = Server("a:1")
        world = World([server])
        number = world.submit()
        server.fail(ApiServerError())
        world.open(0)
        world.clock.advance(0.3)
        assert isinstance(world.outcome(number), ApiServerError)
        world.settle()

    def test_one_event_at_a_time_finds_out_whether_it_works_again(self) -> None:
        servers = [Server("a:1", 4), Server("b:1", 1)]
        world = World([servers[0]], [servers[1]])
        world.open(0)
        for _ in range(4):
            world.submit()
        assert (len(servers[0].running), len(servers[1].running)) == (0, 1)
        world.clock.advance(2)
        assert len(servers[0].running) == 1, "those who wait need nobody else to come for the trial to begin"
        servers[0].finish()
        assert len(servers[0].running) == 2
        world.settle()

    def test_a_cancelled_trial_makes_way_for_another(self) -> None:
        server = Server("a:1")
        world = World([server])
        world.open(0)
        world.clock.advance(1)
        first, second = world.submit(), world.submit()
        assert server.taken == [str(first)]
        world.submitted[first].cancel()
        assert server.taken == [str(first), str(second)]
        server.finish()
        assert world.circuit(0) is CircuitState.CLOSED
        world.settle()

    @pytest.mark.parametrize("kind", [ApiClientError, ContextLengthExceeded])
    def test_a_fault_of_the_request_opens_nothing(self, kind: type[DomainError]) -> None:
        server = Server("a:1")
        server.behave = kind
        world = World([server])
        for _ in range(50):
            world.submit()
        assert world.circuit(0) is CircuitState.CLOSED
        world.settle()

    def test_silence_at_the_events_own_deadline_proves_nothing(self) -> None:
        server = Server("a:1")
        world = World([server])
        for _ in range(20):
            world.submit(seconds=1)
            world.clock.advance(1)
            server.fail(DeadlineExceeded())
        assert world.circuit(0) is CircuitState.CLOSED
        for _ in range(5):
            world.submit(seconds=10)
            world.clock.advance(1)
            server.fail(DeadlineExceeded())
        assert world.circuit(0) is CircuitState.OPEN
        world.settle()

    @pytest.mark.parametrize("kind", [ApiServerError, ApiConnectionError, ApiAuthenticationError, ApiClientError])
    def test_a_backend_that_fails_at_once_attracts_nothing(self, kind: type[DomainError]) -> None:
        """It is never busy, so that by load alone it would get nearly all: here the other has a share of its own."""
        bad, good = Server("a:1", 2), Server("b:1", 2)
        bad.behave = kind
        world = World([bad, good])
        for _ in range(120):
            world.submit()
            world.clock.advance(0.5)
            if good.running:
                good.finish()
        answered = [found for found in world.outcomes.values() if found == [COMPLETION]]
        assert len(bad.taken) < 0.15 * len(good.taken)
        assert len(answered) >= (120 if kind in (ApiServerError, ApiConnectionError) else 105)
        world.settle()


class TestHealth:
    def test_a_probe_that_fails_confirms_what_an_event_found(self) -> None:
        servers = [Server("a:1"), Server("b:1")]
        world = World([servers[0]], [servers[1]])
        world.submit()
        servers[0].fail(ApiConnectionError())
        assert world.circuit(0) is CircuitState.CLOSED
        servers[0].healthy = False
        Deferred.fromCoroutine(world.pool.members[0].probe())
        assert world.circuit(0) is CircuitState.OPEN
        world.settle()

    def test_after_its_restart_a_backend_is_used_again_within_two_seconds(self) -> None:
        """However long it was away, and however long its circuit's back-off had become."""
        server = Server("a:1")
        world = World([server])
        prober = Prober(world.pool.members[0], world.clock, lambda: 0.5)
        prober.startService()
        server.healthy = False

        def refused() -> DomainError:
            server.state = replace(server.state, up=False)
            return ApiConnectionError()

        server.behave = refused
        for _ in range(100):
            world.submit()
            world.clock.advance(1)
        assert world.circuit(0) is CircuitState.OPEN
        server.healthy = True
        server.behave = lambda: COMPLETION
        world.clock.pump([0.5] * 4)
        assert world.circuit(0) is CircuitState.HALF_OPEN
        assert world.outcome(world.submit()) is COMPLETION
        assert world.circuit(0) is CircuitState.CLOSED
        prober.stopService()
        world.settle()

    def test_health_alone_does_not_vouch_for_a_backend_that_fails_events(self) -> None:
        server = Server("a:1")
        world = World([server])
        world.open(0)
        Deferred.fromCoroutine(world.pool.members[0].probe())
        assert world.circuit(0) is CircuitState.OPEN
        world.settle()

    def test_a_server_that_generates_but_answers_no_probe_is_used(self) -> None:
        server = Server("a:1")
        server.healthy = False
        server.behave = lambda: COMPLETION
        world = World([server])
        for _ in range(50):
            Deferred.fromCoroutine(world.pool.members[0].probe())
            assert world.outcome(world.submit()) is COMPLETION
        world.settle()


class TestSlots:
    """How many events it can have under way, for whoever hands them to it."""

    def test_those_of_backends_that_are_up_with_a_usable_circuit(self) -> None:
        servers = [Server("a:1", 4), Server("b:1", 2), Server("c:1", 8)]
        world = World([servers[0], servers[1]], [servers[2]])
        assert world.pool.slots == 14
        servers[2].state = replace(servers[2].state, up=False)
        assert world.pool.slots == 6
        world.open(0)
        assert world.pool.slots == 2
        servers[1].state = replace(servers[1].state, up=False)
        assert world.pool.slots == 10, "none is up: any that may be tried"
        world.open(1)
        world.open(2)
        assert world.pool.slots == 1

    def test_what_is_under_way_takes_none_of_those_that_can_be_had(self) -> None:
        """A long answer of a backend that is avoided now does not use up the slots of the others."""
        servers = [Server("a:1", 2), Server("b:1", 2)]
        world = World([servers[0]], [servers[1]])
        for _ in range(3):
            world.submit()
        world.open(0)
        assert world.pool.slots == 4, "two that run there, two slots here"
        world.open(1)
        assert world.pool.slots == 4, "all three, and one that is to be told"
        servers[0].finish()
        servers[0].finish()
        assert world.pool.slots == 2
        world.settle()

    def test_half_open_there_is_one(self) -> None:
        servers = [Server("a:1", 4), Server("b:1", 2)]
        world = World([servers[0]], [servers[1]])
        world.open(0)
        world.clock.advance(1)
        assert world.circuit(0) is CircuitState.HALF_OPEN
        assert world.pool.slots == 3
        world.submit()
        assert (len(servers[0].running), world.pool.slots) == (1, 3)
        servers[0].finish()
        assert world.pool.slots == 6
        world.settle()

    def test_fewer_than_are_under_way(self) -> None:
        servers = [Server("a:1", 3), Server("b:1", 2)]
        world = World([servers[0]], [servers[1]])
        for _ in range(3):
            world.submit()
        servers[0].state = replace(servers[0].state, slots=1)
        assert world.pool.slots == 5, "the other's two can still be had"
        world.settle()

    def test_a_probe_and_the_end_of_a_back_off_are_told(self) -> None:
        server = Server("a:1", 4)
        world = World([server])
        told: list[int] = []
        world.pool.watch(lambda: told.append(world.pool.slots))
        server.state = replace(server.state, slots=6)
        Deferred.fromCoroutine(world.pool.members[0].probe())
        assert told == [6]
        server.behave = ApiServerError
        while world.circuit(0) is not CircuitState.OPEN:
            world.submit()
            world.clock.advance(0)
        world.clock.advance(0.5)
        assert told == [6]
        world.clock.advance(1)
        assert told == [6, 1], "nobody waits in the pool, but somebody may elsewhere"
        world.settle()

    def test_the_retry_budget_does_not_shrink_with_them(self) -> None:
        """A backend that dies takes its slots along when its events need them most."""
        servers = [Server("a:1", 20), Server("b:1", 5)]
        world = World([servers[0]], [servers[1]])
        for _ in range(20):
            world.submit()
        while servers[0].running:
            servers[0].fail(ApiConnectionError())
        world.clock.advance(0)
        world.settle()
        assert all(found == [COMPLETION] for found in world.outcomes.values())


class TestLeaving:
    def test_a_caller_who_leaves_while_waiting_running_or_between_two_attempts(self) -> None:
        server = Server("a:1")
        world = World([server])
        between = world.submit()
        server.fail(ApiServerError())
        running, waiting, last = world.submit(), world.submit(), world.submit()
        for number in (waiting, running, between):
            world.submitted[number].cancel()
            assert isinstance(world.outcome(number), CancelledError)
        assert server.taken[-1] == str(last)
        world.settle()
        assert world.outcome(last) is COMPLETION

    def test_leaving_counts_as_neither_success_nor_failure(self) -> None:
        server = Server("a:1", 100)
        world = World([server])
        for _ in range(CONSECUTIVE_FAILURES - 1):
            number = world.submit()
            server.fail(ApiServerError())
            world.submitted[number].cancel()
        for _ in range(50):
            world.submitted[world.submit()].cancel()
        assert world.circuit(0) is CircuitState.CLOSED
        world.submit()
        server.fail(ApiServerError())
        assert world.circuit(0) is CircuitState.OPEN
        world.settle()

    def test_a_deadline_while_waiting(self) -> None:
        server = Server("a:1")
        world = World([server])
        world.submit()
        number = world.submit(seconds=5)
        world.clock.advance(5)
        assert isinstance(world.outcome(number), DeadlineExceeded)
        world.settle()
        assert server.taken == ["0"]

    def test_a_deadline_that_has_passed_already(self) -> None:
        server = Server("a:1")
        world = World([server])
        assert isinstance(world.outcome(world.submit(seconds=0)), DeadlineExceeded)
        assert not server.taken
        world.settle()

    def test_very_many_who_wait_and_all_fail_at_once(self) -> None:
        """No slot is handed on from within the handing on of another, which would end in a RecursionError."""
        server = Server("a:1")
        world = World([server], max_attempts=1)
        for _ in range(3000):
            world.submit()
        server.behave = ApiClientError
        server.finish()
        assert Counter(type(found) for [found] in world.outcomes.values()) == {Completion: 1, ApiClientError: 2999}
        world.settle()


class TestWorstCases:
    @pytest.mark.parametrize("slots", [1, 4, 16])
    def test_one_of_two_dies_amid_many_events(self, slots: int) -> None:
        """What had no token yet is answered by the other; the circuit opens; the dead one is used once it is back."""
        servers = [Server("a:1", slots), Server("b:1", slots)]
        world = World(servers)
        probers = [Prober(member, world.clock, lambda: 0.5) for member in world.pool.members]
        for prober in probers:
            prober.startService()
        dead = servers[0]
        streaming = set()
        opened = False

        def refused() -> DomainError:
            dead.state = replace(dead.state, up=False)
            return ApiConnectionError("refused")

        for tick in range(600):
            while len(world.submitted) < 200 and sum(not found for found in world.outcomes.values()) < 2 * slots:
                world.submit()
            if tick == 20:
                dead.healthy = False
                dead.behave = refused
                for number, answer in enumerate(list(dead.running)):
                    error = ApiConnectionError("broke")
                    if number % 2:
                        error.after_first_token = True
                        streaming.add(error)
                    answer.errback(error)
            if tick == 80:
                dead.healthy = True
                dead.behave = None
            world.clock.advance(0.1)
            opened = opened or world.circuit(0) is CircuitState.OPEN
            for server in servers:
                if server.running and tick % 2:
                    server.finish()
            if len(world.submitted) == 200 and all(world.outcomes.values()):
                break
        assert Counter(type(found) for [found] in world.outcomes.values()) == Counter(
            {Completion: 200 - len(streaming), **({ApiConnectionError: len(streaming)} if streaming else {})}
        )
        assert opened
        assert world.circuit(0) is CircuitState.CLOSED
        assert max(map(int, dead.taken)) > 60
        for prober in probers:
            prober.stopService()
        world.settle()

    @pytest.mark.parametrize("kind", [ApiServerError, ApiConnectionError])
    def test_a_bad_hour(self, kind: type[DomainError]) -> None:
        """Everything fails for an hour: retries stay within a tenth of the requests and a small floor."""
        servers = [Server("a:1", 4), Server("b:1", 4)]
        for server in servers:
            server.behave = kind
        world = World(servers, jitter=0.5)
        for _ in range(3600):
            world.submit()
            world.clock.advance(1)
        world.settle()
        attempts = sum(len(server.taken) for server in servers)
        tried = len({number for server in servers for number in server.taken})
        assert attempts - tried <= 360 + 2 * FLOOR
        assert all(isinstance(found, kind | NoBackendAvailable) for [found] in world.outcomes.values())

    def test_a_bad_hour_in_which_no_circuit_opens(self) -> None:
        """One in three attempts fails, which no circuit notices: the budget holds nevertheless."""
        random = Random(5)
        server = Server("a:1", 8)
        server.behave = lambda: COMPLETION if random.random() > 0.33 else ApiServerError()
        world = World([server], jitter=0.5)
        for _ in range(7200):
            world.submit()
            world.clock.advance(0.5)
        world.settle()
        tried = len(set(server.taken))
        assert len(server.taken) - tried <= 720 + 2 * FLOOR
        assert len(server.taken) - tried > 600, "what the budget allows is used"


ERRORS = [ApiServerError, ApiConnectionError, ApiRateLimited, ApiClientError, DeadlineExceeded]
STEPS = st.tuples(
    st.sampled_from(["submit", "finish", "fail", "late", "cancel", "wait", "probe", "slots"]), st.integers(0, 30)
)


@given(
    ranks=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=2), min_size=1, max_size=2),
    steps=st.lists(STEPS, max_size=80),
    jitter=st.floats(0, 1),
    silence=st.booleans(),
)
def test_nothing_is_lost_doubled_or_over_the_bounds(
    ranks: list[list[int]], steps: list[tuple[str, int]], jitter: float, silence: bool
) -> None:
    names: Iterator[int] = iter(range(100))
    servers = [[Server(f"s:{next(names)}", slots) for slots in rank] for rank in ranks]
    world = World(*servers, jitter=jitter, silence=silence)
    cancelled: set[int] = set()
    busy = 0
    for step, choice in steps:
        server = world.servers[choice % len(world.servers)]
        before = {one: len(one.running) for one in world.servers}
        if step == "submit":
            world.submit(seconds=1 + choice)
        elif step == "wait":
            world.clock.pump([0.25] * choice)
        elif step == "cancel" and world.submitted:
            number = choice % len(world.submitted)
            if not world.outcomes[number]:
                cancelled.add(number)
            world.submitted[number].cancel()
        elif step == "probe":
            server.healthy = choice % 3 > 0
            Deferred.fromCoroutine(world.pool.members[world.servers.index(server)].probe())
        elif step == "slots":
            server.state = replace(server.state, slots=1 + choice % 4)
        elif server.running and step == "finish":
            server.finish(choice % len(server.running))
        elif server.running and step in ("fail", "late"):
            error = ERRORS[choice % len(ERRORS)]()
            error.after_first_token = step == "late"
            busy += isinstance(error, ApiRateLimited)
            server.fail(error, choice % len(server.running))
        for member, one in zip(world.pool.members, world.servers, strict=True):
            assert member.running == len(one.running)
            assert len(one.running) <= max(one.state.slots, before[one])
    world.settle()
    attempts = Counter(prompt for server in world.servers for prompt in server.taken)
    assert all(count <= 3 for count in attempts.values())
    floor = max(FLOOR, 4 * len(world.servers)) * (1 + world.clock.seconds() / 3600)
    assert sum(attempts.values()) - len(attempts) - busy <= len(world.submitted) / 10 + floor
    assert all(isinstance(world.outcome(number), CancelledError) for number in cancelled)
    completed = [found for [found] in world.outcomes.values() if isinstance(found, Completion)]
    assert all(found is COMPLETION for found in completed)
