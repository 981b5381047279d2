"""Which failures are worth another attempt, how long to wait for it, and how many there may be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from ai_ticket.backend.retry import BASE_SECONDS, FLOOR, LONGEST_SECONDS, RetryBudget, make_retry_policy
from ai_ticket.errors import (
    ApiAuthenticationError,
    ApiClientError,
    ApiConnectionError,
    ApiRateLimited,
    ApiResponseFormatError,
    ApiResponseStructureError,
    ApiServerError,
    ContextLengthExceeded,
    DeadlineExceeded,
    DomainError,
    InternalError,
)

CURABLE = [
    ApiAuthenticationError,
    ApiConnectionError,
    ApiServerError,
    ApiResponseFormatError,
    ApiResponseStructureError,
    ApiRateLimited,
]
FINAL = [ApiClientError, ContextLengthExceeded, InternalError]


@pytest.mark.parametrize("kind", CURABLE)
def test_what_another_attempt_can_cure(kind: type[DomainError]) -> None:
    policy = make_retry_policy(max_attempts=3, silence_is_curable=False, random=lambda: 0.5)
    assert policy(1, kind()) is not None
    assert policy(2, kind()) is not None
    assert policy(3, kind()) is None


@pytest.mark.parametrize("kind", FINAL)
def test_what_no_other_attempt_can_cure(kind: type[DomainError]) -> None:
    assert make_retry_policy(max_attempts=3, silence_is_curable=True, random=lambda: 0.5)(1, kind()) is None


@pytest.mark.parametrize("kind", CURABLE)
def test_nothing_is_tried_again_after_the_first_token(kind: type[DomainError]) -> None:
    error = kind()
    error.after_first_token = True
    assert make_retry_policy(max_attempts=3, silence_is_curable=True, random=lambda: 0.5)(1, error) is None


def test_silence_is_curable_where_it_leaves_time() -> None:
    for curable in (True, False):
        policy = make_retry_policy(max_attempts=3, silence_is_curable=curable, random=lambda: 0.5)
        assert (policy(1, DeadlineExceeded()) is not None) is curable


@given(
    attempt=st.integers(1, 10_000),
    random=st.floats(0, 1),
    kind=st.sampled_from(CURABLE),
    asked=st.none() | st.floats(0, 100),
)
def test_full_jitter_under_a_doubling_cap(
    attempt: int, random: float, kind: type[DomainError], asked: float | None
) -> None:
    """The wait is anything from nothing to the cap, which doubles up to four seconds, beyond what was asked for."""
    policy = make_retry_policy(max_attempts=20_000, silence_is_curable=False, random=lambda: random)
    delay = policy(attempt, kind(retry_after=asked))
    longest = min(LONGEST_SECONDS, BASE_SECONDS * 2 ** min(attempt - 1, 10))
    assert delay == (asked or 0.0) + random * longest


def test_one_attempt_is_no_retry() -> None:
    assert make_retry_policy(max_attempts=1, silence_is_curable=True, random=lambda: 0.5)(1, ApiServerError()) is None


class TestBudget:
    def test_the_floor_is_there_from_the_start(self) -> None:
        budget = RetryBudget(Clock(), lambda: 1)
        assert [budget.withdraw() for _ in range(FLOOR + 2)] == [True] * FLOOR + [False] * 2

    def test_a_pool_with_many_slots_has_a_higher_floor(self) -> None:
        budget = RetryBudget(Clock(), lambda: 64)
        assert sum(budget.withdraw() for _ in range(100)) == 64

    def test_ten_requests_bring_one_retry(self) -> None:
        budget = RetryBudget(Clock(), lambda: 1)
        while budget.withdraw():
            pass
        for _ in range(11):
            budget.request()
        assert [budget.withdraw(), budget.withdraw()] == [True, False]

    def test_good_times_are_not_saved_up(self) -> None:
        budget = RetryBudget(Clock(), lambda: 1)
        for _ in range(10_000):
            budget.request()
        assert budget.left == FLOOR

    def test_the_floor_comes_back_within_an_hour(self) -> None:
        clock = Clock()
        budget = RetryBudget(clock, lambda: 1)
        while budget.withdraw():
            pass
        clock.advance(400)
        assert budget.withdraw()
        assert not budget.withdraw()
        clock.advance(3600)
        assert budget.left == FLOOR

    @given(
        floor=st.integers(1, 30),
        steps=st.lists(st.sampled_from(["request", "retry", "wait"]) | st.floats(0, 600), max_size=300),
    )
    def test_any_span_of_time_keeps_the_bound(self, floor: int, steps: list[str | float]) -> None:
        clock = Clock()
        budget = RetryBudget(clock, lambda: floor)
        history: list[tuple[float, int, int]] = [(0.0, 0, 0)]
        requests = retries = 0
        for step in steps:
            if isinstance(step, float):
                clock.advance(step)
            elif step == "request":
                budget.request()
                requests += 1
            else:
                retries += budget.withdraw()
            history.append((clock.seconds(), requests, retries))
        size = max(FLOOR, floor)
        for since, requests_before, retries_before in history:
            hours = (clock.seconds() - since) / 3600
            allowed = (requests - requests_before) / 10 + size * (1 + hours)
            assert retries - retries_before <= allowed + 1e-6
