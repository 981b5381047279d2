"""Places for connections: who gets one, who makes room, and that the counts are exact."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logged import logged, logged_facts
from twisted.internet.task import Clock

from ai_ticket.telemetry.logs_repeats import WINDOW_SECONDS
from ai_ticket.web.caps import LOOK_SECONDS, TELL_SECONDS, Caps


class Member:
    """A connection. `looks` counts how often somebody asked whether one is idle."""

    looks = 0

    def __init__(self, client: str, asked_at: float, idle: bool = True):
        self.client = client
        self.asked_at = asked_at
        self.is_idle = idle
        self.aborted = False

    @property
    def idle(self) -> bool:
        Member.looks += 1
        return self.is_idle

    def abort(self) -> None:
        self.aborted = True


class World:
    def __init__(self, limit: int = 3, per_client: int | None = None):
        self.clock = Clock()
        self.ended: Counter[str] = Counter()
        self.caps: Caps[Member] = Caps(
            self.clock.seconds, limit=limit, per_client=per_client, ended=lambda reason: self.ended.update([reason])
        )

    def enter(self, client: str = "a", *, idle: bool = True) -> Member | None:
        """A newcomer, a moment after the one before; None if there is no place for it."""
        self.clock.advance(0.001)
        member = Member(client, self.clock.seconds(), idle)
        return member if self.caps.enter(member) else None

    def entered(self, client: str = "a", *, idle: bool = True) -> Member:
        found = self.enter(client, idle=idle)
        assert found is not None
        return found


def test_the_one_that_has_asked_for_nothing_for_longest_makes_room() -> None:
    world = World()
    first, second, third = world.entered(), world.entered(), world.entered()
    first.asked_at = world.clock.seconds()
    world.entered()
    assert (first.aborted, second.aborted, third.aborted) == (False, True, False)
    assert len(world.caps) == 3


def test_without_an_idle_one_the_newcomer_is_refused() -> None:
    world = World()
    members = [world.entered(idle=False) for _ in range(3)]
    assert world.enter() is None
    assert not any(member.aborted for member in members)
    assert len(world.caps) == 3


def test_a_client_at_its_cap_makes_room_itself() -> None:
    world = World(limit=10, per_client=2)
    other = world.entered("b")
    own = [world.entered("a"), world.entered("a", idle=False)]
    world.entered("a", idle=False)
    assert (other.aborted, own[0].aborted) == (False, True)
    assert world.enter("a") is None
    assert world.enter("b") is not None
    assert world.caps.clients() == {"a": 2, "b": 2}


def test_a_client_below_its_cap_meets_the_one_on_all() -> None:
    world = World(limit=2, per_client=2)
    oldest = world.entered("a")
    world.entered("b", idle=False)
    assert world.enter("c", idle=False) is not None
    assert oldest.aborted
    assert world.enter("d") is None
    assert world.caps.clients() == {"b": 1, "c": 1}


def test_a_client_of_one_connection() -> None:
    world = World(per_client=1)
    first = world.entered()
    world.entered()
    assert first.aborted
    assert world.caps.clients() == {"a": 1}


def test_looking_for_an_idle_one_is_no_work_for_each_newcomer() -> None:
    """Else who holds many busy connections makes each further one cost a look at all of them."""
    world = World(limit=1000)
    for _ in range(1000):
        world.entered(idle=False)
    Member.looks = 0
    for _ in range(400):
        assert world.enter() is None
    assert Member.looks == 1000


@pytest.mark.parametrize("idle", [1, 10, 50, 100, 900, 1000])
def test_nor_is_it_where_some_are_idle(idle: int) -> None:
    world = World(limit=1000)
    for number in range(1000):
        world.entered(idle=number < idle)
    Member.looks = 0
    admitted = 0
    for _ in range(400):
        admitted += world.enter(idle=False) is not None
    assert admitted == min(idle, 400)
    assert Member.looks <= 2000 + 400


def test_newcomers_that_fall_idle_make_room_for_the_next_at_once() -> None:
    world = World(limit=10)
    members = [world.entered() for _ in range(100)]
    assert [member.aborted for member in members] == [True] * 90 + [False] * 10


def test_the_next_look_finds_what_has_fallen_idle() -> None:
    world = World()
    members = [world.entered(idle=False) for _ in range(3)]
    assert world.enter() is None
    members[1].is_idle = True
    assert world.enter() is None
    world.clock.advance(LOOK_SECONDS)
    world.entered(idle=False)
    assert [member.aborted for member in members] == [False, True, False]


@pytest.mark.parametrize("what", ["has gone", "is busy", "has asked since"])
def test_one_that_was_idle_at_the_last_look(what: str) -> None:
    """All that a look finds make room one after the other; but only who still can."""
    world = World()
    members = [world.entered() for _ in range(3)]
    newcomer = world.entered(idle=False)
    assert members[0].aborted
    if what == "has gone":
        world.caps.leave(members[1])
        world.entered(idle=False)
    elif what == "is busy":
        members[1].is_idle = False
    else:
        world.clock.advance(0.001)
        members[1].asked_at = world.clock.seconds()
    Member.looks = 0
    world.entered(idle=False)
    assert (members[1].aborted, members[2].aborted, newcomer.aborted) == (False, True, False)
    assert Member.looks <= 2


def test_who_left_is_not_kept_in_memory() -> None:
    world = World(limit=100, per_client=100)
    members = [world.entered() for _ in range(100)]
    world.entered()
    for member in [member for member in world.caps if member not in members[:1]]:
        world.caps.leave(member)
    assert world.caps._all._idle == {}
    assert (len(world.caps), world.caps.clients()) == (0, {})


def test_each_for_whom_there_was_no_room_is_counted() -> None:
    world = World(limit=3, per_client=2)
    for _ in range(3):
        world.entered("a")
    for client in "bb":
        world.entered(client, idle=False)
    for client in "bbcd":
        world.enter(client, idle=False)
    assert world.ended == {
        "max_connections_per_client": 1,
        "max_connections_per_client_refused": 2,
        "max_connections": 2,
        "max_connections_refused": 1,
    }


TOLD = "{variable} reached: {closed} idle connections closed for newcomers, {refused} newcomers refused"


def test_for_how_many_there_was_no_room_is_told_at_once() -> None:
    world = World(limit=3, per_client=2)
    for _ in range(4):
        world.entered("192.0.2.7")
    for _ in range(2):
        world.entered("192.0.2.8", idle=False)
    with logged() as lines:
        world.caps.report()
        world.caps.report()
    assert lines == [
        "warn: " + TOLD.format(variable="MAX_CONNECTIONS_PER_CLIENT=2", closed=2, refused=0),
        "warn: " + TOLD.format(variable="MAX_CONNECTIONS=3", closed=1, refused=0),
    ]


def test_later_ones_are_added_up_and_told_where_the_log_takes_them_for_no_repeat() -> None:
    """The log tells a line that differs from another in numbers alone only as its repeat, without the numbers."""
    world = World(limit=10, per_client=1)
    world.entered("a")
    for client in "ab":
        world.entered(client, idle=False)
    message = TOLD.format(variable="MAX_CONNECTIONS_PER_CLIENT=1", closed=0, refused=6)
    with logged() as lines, logged_facts(message) as later:
        world.caps.report()
        told_at = world.clock.seconds()
        for client in "bbabbb":
            assert world.enter(client) is None
            world.caps.report()
        assert len(lines) == 1
        world.clock.advance(told_at + WINDOW_SECONDS + 0.5 - world.clock.seconds())
        world.caps.report()
        assert len(lines) == 1
        world.clock.advance(TELL_SECONDS - WINDOW_SECONDS)
        world.caps.report()
        world.clock.advance(TELL_SECONDS)
        world.caps.report()
    assert len(lines) == 2
    [facts] = later
    assert (facts["client"], facts["clients"]) == ("b", 2)


STEPS = st.lists(
    st.tuples(st.sampled_from(["enter", "leave", "leave again", "idle", "busy", "wait"]), st.integers(0, 50)),
    max_size=200,
)


@given(STEPS, st.integers(1, 8), st.one_of(st.none(), st.integers(1, 4)))
def test_the_counts_are_exact(steps: list[tuple[str, int]], limit: int, per_client: int | None) -> None:
    world = World(limit, per_client)
    inside: list[Member] = []
    left: list[Member] = []
    for step, number in steps:
        if step == "enter":
            newcomer = world.enter("abc"[number % 3], idle=number % 2 == 0)
            if newcomer is not None:
                inside.append(newcomer)
        elif step == "wait":
            world.clock.advance(LOOK_SECONDS)
        elif step == "leave again" and left:
            world.caps.leave(left[number % len(left)])
        elif inside:
            member: Any = inside[number % len(inside)]
            if step == "leave":
                world.caps.leave(member)
                left.append(member)
                inside.remove(member)
            else:
                member.is_idle = step == "idle"
        left += [member for member in inside if member.aborted]
        inside = [member for member in inside if not member.aborted]
        assert list(world.caps) == inside
        assert len(inside) <= limit
        counts = Counter(member.client for member in inside)
        assert world.caps.clients() == ({} if per_client is None else counts)
        assert per_client is None or max(counts.values(), default=0) <= per_client
