"""When a place in the queue comes to its turn."""

from heapq import heapreplace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation import make_job

from ai_ticket.interfaces import Job
from ai_ticket.pipeline.forecast import GUESS_SECONDS, Forecast

NOW = 1000.0


def running(*ages: float) -> list[Job]:
    jobs = [make_job("?", deadline=None) for _ in ages]
    for job, age in zip(jobs, sorted(ages, reverse=True), strict=True):
        job.began_at = NOW - age
    return jobs


def forecast(seconds: float) -> Forecast:
    made = Forecast()
    made.succeeded(seconds)
    return made


def test_a_guess_until_something_was_measured() -> None:
    guess = Forecast()
    assert not guess.measured
    assert guess.wait(3, 1, running(0), NOW) == 3 * GUESS_SECONDS
    guess.succeeded(5)
    assert guess.measured
    assert guess.wait(3, 1, running(0), NOW) == 15


def test_free_slots() -> None:
    assert [forecast(3).wait(place, 4, running(1, 2), NOW) for place in range(1, 7)] == [0, 0, 1, 2, 3, 3]


def test_more_under_way_than_slots() -> None:
    assert [forecast(3).wait(place, 1, running(0, 1, 2), NOW) for place in (1, 2)] == [3, 6]


def test_one_that_takes_longer_than_usual_may_end_any_moment() -> None:
    assert forecast(3).wait(1, 1, running(100), NOW) == 0


@given(
    slots=st.integers(1, 5),
    ages=st.lists(st.floats(0, 3), max_size=5),
    place=st.integers(1, 30),
)
def test_as_it_comes_if_all_take_as_long(slots: int, ages: list[float], place: int) -> None:
    ages = ages[:slots]
    free_at = sorted([3 - age for age in ages] + [0.0] * (slots - len(ages)))
    for _ in range(place - 1):
        heapreplace(free_at, free_at[0] + 3)
    assert forecast(3).wait(place, slots, running(*ages), NOW) == pytest.approx(free_at[0])


def test_it_follows_what_is_measured() -> None:
    made = forecast(10)
    made.succeeded(20)
    assert 10 < made.seconds < 20
    for _ in range(50):
        made.succeeded(20)
    assert made.seconds == pytest.approx(20, abs=0.01)


def test_a_deadline_that_cuts_only_ever_makes_it_slower() -> None:
    made = forecast(10)
    made.cut(1)
    assert made.seconds == 10
    made.cut(60)
    assert made.seconds > 10
