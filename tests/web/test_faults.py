"""Errors to headers."""

import pytest

from ai_ticket.web.faults import Quota, RateLimited, error_headers, quota_headers, status_of


def test_a_quota_that_is_used_up() -> None:
    """Retry-After is not before the end of the window that RateLimit tells of (draft, section 6)."""
    error = RateLimited(retry_after=12.3, quota=Quota(limit=120, window=60.0, remaining=0))
    assert status_of(error) == 429
    assert dict(error_headers(error)) == {
        b"retry-after": b"13",
        b"ratelimit-policy": b'"default";q=120;w=60',
        b"ratelimit": b'"default";r=0;t=13',
    }


def test_a_limit_that_is_no_quota_is_not_told_as_one() -> None:
    assert error_headers(RateLimited(retry_after=0.0)) == ((b"retry-after", b"1"),)


@pytest.mark.parametrize(("window", "said"), [(0.01, 1), (1.0, 1), (59.5, 60), (86400.0, 86400)])
def test_windows_are_whole_seconds(window: float, said: int) -> None:
    """And never 0, which the draft forbids."""
    policy, state = quota_headers(Quota(5, window, 3), 0.0)
    assert policy[1] == b'"default";q=5;w=%d' % said
    assert state[1] == b'"default";r=3;t=0'
