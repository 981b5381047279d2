"""A backend's circuit: what opens it, what it lets through meanwhile, and what closes it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from ai_ticket.backend.circuit import CONSECUTIVE_FAILURES, LONGEST_BACK_OFF, Circuit, CircuitState

CLOSED, HALF_OPEN, OPEN = CircuitState.CLOSED, CircuitState.HALF_OPEN, CircuitState.OPEN


class World:
    """A circuit on a clock of its own; with the jitter at its longest, back-offs are whole seconds."""

    def __init__(self, jitter: float = 1.0) -> None:
        self.clock = Clock()
        self.circuit = Circuit("b:1", self.clock, lambda: jitter)

    def attempt(self, *outcomes: bool) -> None:
        for success in outcomes:
            ticket = self.circuit.enter()
            (self.circuit.succeeded if success else self.circuit.failed)(ticket)

    def open(self) -> "World":
        self.attempt(*[False] * CONSECUTIVE_FAILURES)
        assert self.circuit.state is OPEN
        return self


def test_the_metric_has_these_values() -> None:
    assert [int(state) for state in (CLOSED, HALF_OPEN, OPEN)] == [0, 1, 2]


def test_it_opens_after_failures_in_a_row() -> None:
    world = World()
    world.attempt(*[False] * (CONSECUTIVE_FAILURES - 1), True, *[False] * (CONSECUTIVE_FAILURES - 1))
    assert world.circuit.state is CLOSED
    world.attempt(False)
    assert world.circuit.state is OPEN
    assert not world.circuit.lets_through()


def test_it_opens_where_half_of_the_attempts_fail() -> None:
    world = World()
    world.attempt(*[True, False] * 4)
    assert world.circuit.state is CLOSED
    world.attempt(True, False)
    assert world.circuit.state is OPEN


def test_a_few_failures_among_many_attempts_leave_it_closed() -> None:
    world = World()
    world.attempt(*[True, True, False] * 100)
    assert world.circuit.state is CLOSED


def test_what_proves_nothing_counts_for_nothing() -> None:
    world = World()
    for _ in range(100):
        world.circuit.abandoned(world.circuit.enter())
    world.attempt(*[False] * (CONSECUTIVE_FAILURES - 1))
    world.circuit.abandoned(world.circuit.enter())
    assert world.circuit.state is CLOSED
    world.attempt(False)
    assert world.circuit.state is OPEN


def test_after_the_back_off_one_trial_decides() -> None:
    world = World().open()
    assert world.circuit.closed_until == 1.0
    world.clock.advance(0.9)
    assert world.circuit.state is OPEN
    world.clock.advance(0.1)
    assert world.circuit.state is HALF_OPEN
    assert world.circuit.closed_until == 0.0
    trial = world.circuit.enter()
    assert world.circuit.state is HALF_OPEN
    assert not world.circuit.lets_through()
    world.circuit.succeeded(trial)
    assert world.circuit.state is CLOSED
    assert world.circuit.lets_through()


def test_each_failed_trial_doubles_the_back_off_up_to_a_cap() -> None:
    world = World().open()
    waits = []
    for _ in range(8):
        waits.append(world.circuit.closed_until - world.clock.seconds())
        world.clock.advance(waits[-1])
        world.attempt(False)
    assert waits == [1, 2, 4, 8, 16, LONGEST_BACK_OFF, LONGEST_BACK_OFF, LONGEST_BACK_OFF]


def test_a_success_makes_the_next_back_off_short_again() -> None:
    world = World().open()
    world.clock.advance(1)
    world.attempt(False)
    world.clock.advance(2)
    world.attempt(True)
    world.open()
    assert world.circuit.closed_until - world.clock.seconds() == 1


@pytest.mark.parametrize(("jitter", "seconds"), [(0.0, 0.5), (0.5, 0.75), (1.0, 1.0)])
def test_jitter(jitter: float, seconds: float) -> None:
    assert World(jitter).open().circuit.closed_until == seconds


def test_a_trial_that_is_cancelled_makes_way_for_another() -> None:
    world = World().open()
    world.clock.advance(1)
    world.circuit.abandoned(world.circuit.enter())
    assert world.circuit.state is HALF_OPEN
    world.attempt(True)
    assert world.circuit.state is CLOSED


def test_what_began_before_the_circuit_opened_proves_nothing_any_more() -> None:
    world = World()
    early = [world.circuit.enter() for _ in range(3)]
    world.open()
    world.circuit.succeeded(early[0])
    assert world.circuit.state is OPEN
    world.clock.advance(1)
    world.circuit.failed(early[1])
    trial = world.circuit.enter()
    world.circuit.failed(early[2])
    assert world.circuit.state is HALF_OPEN
    world.circuit.succeeded(trial)
    assert world.circuit.state is CLOSED


def test_a_failed_health_probe_confirms_a_failed_attempt() -> None:
    world = World()
    world.circuit.found_down()
    assert world.circuit.state is CLOSED, "by itself it proves too little"
    world.attempt(True, False)
    world.circuit.found_down()
    assert world.circuit.state is OPEN
    world.circuit.found_down()
    assert world.circuit.closed_until == 1.0, "the back-off goes on"


def test_a_backend_found_up_again_gets_its_trial_at_once() -> None:
    world = World().open()
    world.circuit.found_up()
    assert world.circuit.state is HALF_OPEN
    trial = world.circuit.enter()
    world.circuit.found_up()
    world.circuit.found_down()
    assert not world.circuit.lets_through()
    world.circuit.succeeded(trial)
    world.circuit.found_up()
    assert world.circuit.state is CLOSED


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["enter", "succeed", "fail", "abandon", "up", "down", "wait"]),
            st.integers(0, 20),
        ),
        max_size=100,
    )
)
def test_no_order_of_things_wedges_it(steps: list[tuple[str, int]]) -> None:
    """Whatever happens: open it lets nothing through, half-open one at a time, and a success closes it in the end."""
    world = World(0.5)
    circuit = world.circuit
    tickets: list[int] = []
    for step, choice in steps:
        if step == "enter":
            if circuit.lets_through():
                assert circuit.state is not OPEN
                half_open = circuit.state is HALF_OPEN
                tickets.append(circuit.enter())
                assert circuit.lets_through() is not half_open
        elif step == "wait":
            world.clock.advance(choice)
        elif step == "up":
            circuit.found_up()
        elif step == "down":
            circuit.found_down()
        elif tickets:
            end = {"succeed": circuit.succeeded, "fail": circuit.failed, "abandon": circuit.abandoned}[step]
            end(tickets.pop(choice % len(tickets)))
    for ticket in tickets:
        circuit.abandoned(ticket)
    world.clock.advance(LONGEST_BACK_OFF)
    assert circuit.lets_through()
    if circuit.state is HALF_OPEN:
        circuit.succeeded(circuit.enter())
    assert circuit.state is CLOSED
