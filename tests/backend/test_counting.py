"""Texts in tokens: by the server's own count, in a pool by the first that counts, and never many at a time."""

from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ai_ticket.backend import counting as module
from ai_ticket.backend.pool import Pool
from ai_ticket.backend.probe import KOBOLDCPP, LLAMACPP, OPENAI
from ai_ticket.backend.server import LARGEST_COUNT
from ai_ticket.backend.tokens import tokenize
from ai_ticket.errors import ApiConnectionError, Overloaded
from ai_ticket.interfaces import BackendState, Tokens


class Asked:
    """A model server that is asked one thing."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.answer = answer
        self.asked: list[tuple[str, Any]] = []

    async def ask(self, path: str, payload: Any, type: Callable[..., Any], timeout: float, limit: int) -> Any:
        assert limit == LARGEST_COUNT
        self.asked.append((path, payload))
        return type(**self.answer)


class Counting:
    """A backend that counts, or does not."""

    def __init__(self, tokens: Tokens | None, *, up: bool = True) -> None:
        self.state = BackendState("a:1", up, 1)
        self.tokens = tokens
        self.waiting: list[Deferred[Tokens | None]] = []
        self.held = False
        self.failure: Exception | None = None

    async def tokenize(self, text: str) -> Tokens | None:
        if self.failure is not None:
            raise self.failure
        if self.held:
            self.waiting.append(Deferred())
            return await self.waiting[-1]
        return self.tokens


def pool_of(*backends: Counting) -> Pool:
    ranks: Any = [[backend] for backend in backends]
    return Pool(ranks, clock=Clock(), random=lambda: 0.5, policy=lambda attempt, error: None)


def ask(pool: Pool) -> Deferred[Any]:
    return Deferred.fromCoroutine(pool.tokenize("hello"))


def result(deferred: Deferred[Any]) -> Any:
    got: list[Any] = []
    deferred.addBoth(got.append)
    return got[0]


@pytest.mark.parametrize(
    ("kind", "answer", "asked", "tokens"),
    [
        (
            KOBOLDCPP,
            {"value": 2, "ids": [1, 5]},
            ("/api/extra/tokencount", {"prompt": "hello"}),
            Tokens(2, [1, 5]),
        ),
        (KOBOLDCPP, {"value": 2}, ("/api/extra/tokencount", {"prompt": "hello"}), Tokens(2, [])),
        (
            LLAMACPP,
            {"tokens": [7, 8, 9]},
            ("/tokenize", {"content": "hello", "add_special": True}),
            Tokens(3, [7, 8, 9]),
        ),
    ],
)
def test_each_kind_is_asked_its_own_way(
    kind: str, answer: dict[str, Any], asked: tuple[str, Any], tokens: Tokens
) -> None:
    server: Any = Asked(answer)
    assert result(Deferred.fromCoroutine(tokenize("hello", server, kind, 5.0))) == tokens
    assert server.asked == [asked]


def test_others_do_not_tell() -> None:
    server: Any = Asked({})
    assert result(Deferred.fromCoroutine(tokenize("hello", server, OPENAI, 5.0))) is None
    assert server.asked == []


def test_the_first_that_counts() -> None:
    first, second, third = Counting(Tokens(9, []), up=False), Counting(None), Counting(Tokens(3, []))
    assert result(ask(pool_of(first, second, third))) == Tokens(3, [])
    assert result(ask(pool_of(first, second))) is None


def test_one_that_fails_says_so() -> None:
    backend = Counting(None)
    backend.failure = ApiConnectionError()
    pool = pool_of(backend)
    assert result(ask(pool)).check(ApiConnectionError)
    backend.failure = None
    assert result(ask(pool)) is None


def test_one_at_a_time_and_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_COUNTS", 2)
    backend = Counting(None)
    backend.held = True
    pool = pool_of(backend)
    asked = [ask(pool) for _ in range(4)]
    assert len(backend.waiting) == 1
    failure = result(asked.pop())
    assert failure.check(Overloaded)
    assert failure.value.retry_after == 1.0
    asked.pop(1).addErrback(lambda _: None).cancel()  # who leaves makes room
    asked.append(ask(pool))
    for number in range(3):
        backend.waiting[number].callback(Tokens(number, []))
    assert [result(one).count for one in asked] == [0, 1, 2]
