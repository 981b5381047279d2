"""Whose turn it is: fair by weight, interactive before batch, with little memory."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_ticket.event import Event, Message, Parameters
from ai_ticket.interfaces import Client, Job
from ai_ticket.pipeline.queue import REMEMBERED_LANES, FairQueue

EVENT = Event([Message("user", "?")], Parameters(max_tokens=5))


def job(client: str, *, weight: int = 1, batch: bool = False) -> Job:
    return Job(event=EVENT, client=Client(client, None, "192.0.2.1", weight=weight), timeout=100, batch=batch)


def fill(queue: FairQueue, client: str, number: int, *, weight: int = 1, batch: bool = False) -> list[Job]:
    jobs = [job(client, weight=weight, batch=batch) for _ in range(number)]
    for one in jobs:
        queue.push(one)
    return jobs


def order(queue: FairQueue, number: int | None = None) -> str:
    """Whose the next jobs are."""
    return "".join(queue.pop().client.key for _ in range(len(queue) if number is None else number))


def test_one_client_first_in_first_out() -> None:
    queue = FairQueue()
    jobs = fill(queue, "a", 5)
    assert [queue.pop() for _ in range(5)] == jobs
    assert not queue


def test_clients_take_turns() -> None:
    queue = FairQueue()
    fill(queue, "a", 4)
    fill(queue, "b", 2)
    fill(queue, "c", 1)
    assert order(queue) == "abcabaa"


def test_by_weight() -> None:
    queue = FairQueue()
    fill(queue, "a", 1000, weight=4)
    fill(queue, "b", 1000)
    served = order(queue, 500)
    assert Counter(served) == {"a": 400, "b": 100}
    assert all(served[start : start + 5].count("b") == 1 for start in range(0, 500, 5)), "and not in bursts"


def test_a_weight_that_changes() -> None:
    queue = FairQueue()
    fill(queue, "a", 100)
    fill(queue, "b", 100)
    order(queue, 2)
    fill(queue, "a", 1, weight=4)
    assert order(queue, 50).count("a") == 40


def test_interactive_before_batch_of_the_same_client_only() -> None:
    queue = FairQueue()
    mass = fill(queue, "a", 3, batch=True)
    fill(queue, "b", 2)
    [question] = fill(queue, "a", 1)
    assert queue.interactive == 3
    served = [queue.pop() for _ in range(6)]
    assert served[0] is question
    assert "".join(one.client.key for one in served) == "ababaa"
    assert [one for one in served if one.batch] == mass


@pytest.mark.parametrize("weight", [1, 3, 100])
@pytest.mark.parametrize("batch", [False, True])
def test_a_newcomer_is_next_whatever_the_others_have(weight: int, batch: bool) -> None:
    queue = FairQueue()
    fill(queue, "a", 1000, weight=weight, batch=batch)
    for _ in range(2 * weight + 1):
        queue.pop()
    fill(queue, "b", 1)
    assert order(queue, 2).index("b") <= 1
    assert order(queue, 10) == 10 * "a"


def test_nobody_gains_by_coming_and_going() -> None:
    """Two clients have a thousand waiting; the third one at a time, which it takes back and sends anew each time."""
    queue = FairQueue()
    fill(queue, "a", 1000)
    fill(queue, "b", 1000)
    [mine] = fill(queue, "c", 1)
    served: Counter[str] = Counter()
    for _ in range(300):
        queue.remove(mine)
        [mine] = fill(queue, "c", 1)
        one = queue.pop()
        served[one.client.key] += 1
        if one is mine:
            [mine] = fill(queue, "c", 1)
    assert served == {"a": 100, "b": 100, "c": 100}


def test_whoever_was_just_served_is_behind_one_that_was_not() -> None:
    queue = FairQueue()
    fill(queue, "a", 1)
    assert order(queue) == "a"
    fill(queue, "a", 1)
    fill(queue, "b", 1)
    assert order(queue) == "ba"


def test_leaving_from_the_middle() -> None:
    queue = FairQueue()
    jobs = fill(queue, "a", 4)
    mass = fill(queue, "a", 2, batch=True)
    [other] = fill(queue, "b", 1)
    for gone in (jobs[1], mass[0], other):
        queue.remove(gone)
    assert [queue.pop() for _ in range(len(queue))] == [jobs[0], jobs[2], jobs[3], mass[1]]


def test_position() -> None:
    queue = FairQueue()
    a, mass = fill(queue, "a", 3), fill(queue, "a", 2, batch=True)
    b = fill(queue, "b", 2, weight=2)
    assert [queue.position(one) for one in a + mass] == [1, 4, 5, 6, 7]
    assert [queue.position(one) for one in b] == [2, 3]
    assert queue.place_for(Client("c", None, "")) == 3, "behind the first of each of the others"
    assert queue.place_for(a[0].client) == 6, "before the batch of its own client"
    assert len(queue._lanes) == 2, "asking leaves no trace"


def test_who_gives_way_in_a_full_queue() -> None:
    queue = FairQueue()
    assert queue.displaced_by(Client("a", None, "")) is None
    a = fill(queue, "a", 4)
    fill(queue, "b", 2)
    fill(queue, "c", 9, batch=True)
    assert queue.displaced_by(Client("d", None, "")) is a[3]
    assert queue.displaced_by(Client("b", None, "")) is a[3]
    queue.remove(a[3])
    assert queue.displaced_by(Client("b", None, "")) is None, "it would have as many as the other"
    assert queue.displaced_by(Client("a", None, "")) is None, "it has the most itself"
    assert queue.displaced_by(Client("c", None, "")) is a[2], "those of its batch do not count"


def test_who_gives_way_by_weight() -> None:
    queue = FairQueue()
    fill(queue, "a", 8, weight=4)
    b = fill(queue, "b", 3)
    assert queue.displaced_by(Client("c", None, "")) is b[2], "2 by weight are less than 3"
    assert queue.displaced_by(Client("a", None, "", weight=4)) is b[2]
    queue.remove(b[2])
    assert queue.displaced_by(Client("a", None, "", weight=4)) is None


def test_clients_who_no_longer_wait_are_forgotten() -> None:
    queue = FairQueue()
    for number in range(10_000):
        fill(queue, str(number), 1)
        queue.pop()
        assert queue.remembered <= REMEMBERED_LANES + 1
        assert len(queue._order) == queue.remembered
    fill(queue, "a", 1000)
    for number in range(10_000):
        [gone] = fill(queue, str(number), 1)
        queue.remove(gone)
        assert queue.remembered <= REMEMBERED_LANES + 2
    order(queue)
    fill(queue, "b", 2)
    assert order(queue) == "bb"
    assert queue.remembered == 1, "once they are no longer ahead"


STEPS = st.lists(
    st.tuples(st.sampled_from(["push", "batch", "pop", "remove"]), st.integers(0, 4), st.integers(0, 20)), max_size=120
)


@given(steps=STEPS, weights=st.lists(st.integers(1, 4), min_size=5, max_size=5))
def test_against_a_model(steps: list[tuple[str, int, int]], weights: list[int]) -> None:
    """Nothing is lost or doubled, lanes keep their order, and positions come true if nobody else comes."""
    queue = FairQueue()
    waiting: list[Job] = []
    for step, client, choice in steps:
        if step in ("push", "batch"):
            waiting += fill(queue, "abcde"[client], 1, weight=weights[client], batch=step == "batch")
        elif step == "pop" and waiting:
            served = queue.pop()
            waiting.remove(served)
            mine = [one for one in waiting if one.client.key == served.client.key]
            assert not served.batch or all(one.batch for one in mine), "interactive before batch"
        elif waiting:
            gone = waiting.pop(choice % len(waiting))
            queue.remove(gone)
        assert len(queue) == len(waiting)
        assert queue.interactive == sum(not one.batch for one in waiting)
    foretold = {one: queue.position(one) for one in waiting}
    order_foretold = queue.beyond(0)
    assert queue.beyond(len(waiting) // 2) == order_foretold[len(waiting) // 2 :]
    served_at = {queue.pop(): number for number in range(1, len(waiting) + 1)}
    assert set(served_at) == set(waiting)
    assert list(served_at) == order_foretold
    for one, position in foretold.items():
        assert abs(position - served_at[one]) <= 4, "off by those that have the same tag, at the most"
        if len(set(weights)) == 1:
            assert position == served_at[one]


@given(
    weights=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    comings=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), max_size=40),
)
def test_whoever_always_waits_gets_a_share(weights: list[int], comings: list[tuple[int, int]]) -> None:
    """However the others come and go, one that always waits is never more than one round behind its share."""
    queue = FairQueue()
    fill(queue, "a", 2000, weight=weights[0])
    counted: Counter[str] = Counter()
    for client, number in comings:
        key = "abcde"[client % len(weights)]
        if key != "a":
            fill(queue, key, number, weight=weights[client % len(weights)])
        for _ in range(number):
            if len(queue):
                counted[queue.pop().client.key] += 1
        for other, weight in zip("bcde", weights[1:], strict=False):
            assert counted[other] / weight <= counted["a"] / weights[0] + 1 + 1 / weight
