"""Who calls, and the file that tokens are read from."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from few_calls import FewCalls
from harness import Recorded
from surface import Surface
from twisted.internet.defer import Deferred, execute
from twisted.logger import globalLogPublisher

from ai_ticket.interfaces import Client
from ai_ticket.tokens import parse_token_list, parse_tokens
from ai_ticket.web.auth import INVALID_TOKENS, INVALID_TOKENS_SECONDS, Authenticator, TokenFile
from ai_ticket.web.faults import RateLimited, Unauthorised
from ai_ticket.web.request import Request


def request(token: str | None, peer: str = "192.0.2.1", forwarded_for: bytes | None = None) -> Request:
    headers = {} if token is None else {b"x-api-key": token.encode()}
    return Request(
        None,  # type: ignore[arg-type]
        method="POST",
        target=b"/event",
        version="1.1",
        headers=headers if forwarded_for is None else {**headers, b"x-forwarded-for": forwarded_for},
        peer=peer,
        secure=True,
        arrived=0.0,
    )


class Door:
    """An authenticator, with two tokens of the settings and one of the file."""

    def __init__(
        self, *, enabled: bool = True, quota_by: Literal["ip", "token"] = "ip", trusted: int = 0, slow: bool = False
    ) -> None:
        self.recorder = Recorded()
        self.limiter = FewCalls(INVALID_TOKENS, INVALID_TOKENS_SECONDS, slow=slow)
        self.authenticator = Authenticator(
            parse_token_list("a,b"),
            enabled=enabled,
            recorder=self.recorder,
            invalid_tokens=self.limiter,
            trusted_proxies=trusted,
            quota_by=quota_by,
        )
        self.authenticator.accept(parse_tokens("bob;weight=4 c"))

    def ask(self, *arguments: Any, **options: Any) -> Client | Exception | None:
        """The client, why there is none, or None if that is not known yet."""
        results: list[Any] = []
        asking = self.authenticator.authenticate(request(*arguments, **options))
        Deferred.fromCoroutine(asking).addErrback(lambda failure: failure.value).addCallback(results.append)
        return results[0] if results else None

    def client(self, *arguments: Any, **options: Any) -> Client:
        found = self.ask(*arguments, **options)
        assert isinstance(found, Client)
        return found


def test_clients_are_told_apart_without_giving_away_their_tokens() -> None:
    clients = [Door().client(token) for token in "abc"]
    assert len({client.key for client in clients}) == 3
    assert all(len(client.key) == 16 for client in clients)
    assert [client.name for client in clients] == [None, None, "bob"]
    assert [client.weight for client in clients] == [1, 1, 4]
    assert all(client.address == client.quota == "192.0.2.1" for client in clients)


def test_a_quota_by_token() -> None:
    """From wherever it comes; the queue tells callers apart by token in any case."""
    door = Door(quota_by="token")
    here, there = door.client("c"), door.client("c", peer="192.0.2.2")
    assert here.quota == here.key == there.quota == there.key
    assert door.client("a").quota != here.quota


@pytest.mark.parametrize("quota_by", ["ip", "token"])
def test_without_authentication_clients_are_addresses(quota_by: Literal["ip", "token"]) -> None:
    """Whatever token they show, and of IPv6 all of a /64 together."""
    door = Door(enabled=False, quota_by=quota_by)
    assert door.client("c") == Client("192.0.2.1", None, "192.0.2.1", "192.0.2.1", 1)
    one, other = door.client(None, peer="2001:db8::1"), door.client("wrong", peer="2001:db8::2")
    assert (one.address, other.address) == ("2001:db8::1", "2001:db8::2")
    assert one.key == one.quota == other.key == other.quota == "2001:db8::/64"
    assert door.recorder.auth_failures == []


def test_the_address_is_the_one_that_trusted_proxies_tell() -> None:
    spoofed = b"198.51.100.66, 2001:db8::7"
    assert Door().client("a", forwarded_for=spoofed).address == "192.0.2.1"
    client = Door(trusted=1).client("a", forwarded_for=spoofed)
    assert (client.address, client.quota) == ("2001:db8::7", "2001:db8::/64")
    assert Door(trusted=3).client("a", forwarded_for=spoofed).address == "192.0.2.1"


def test_ten_invalid_tokens_get_401_and_more_429() -> None:
    """Per address, of IPv6 per /64; who has a valid token is not slowed by them."""
    door = Door()
    assert [type(door.ask("wrong")) for _ in range(12)] == [Unauthorised] * 10 + [RateLimited] * 2
    refusal = door.ask("wrong too")
    assert isinstance(refusal, RateLimited)
    assert (refusal.retry_after, refusal.quota) == (30.0, None)
    assert "wrong" not in str(refusal)
    assert door.client("a")
    assert type(door.ask("wrong", peer="192.0.2.2")) is Unauthorised
    assert [type(door.ask("wrong", peer=f"2001:db8::{host}")) for host in range(11)][-1] is RateLimited
    assert door.recorder.auth_failures == ["invalid"] * 25
    assert door.recorder.refused == ["invalid_token"] * 4


def test_the_address_whose_invalid_tokens_are_counted_can_not_be_spoofed() -> None:
    door = Door()
    found = [type(door.ask("wrong", forwarded_for=f"198.51.100.{host}".encode())) for host in range(11)]
    assert found[-1] is RateLimited


def test_missing_tokens_do_not_count() -> None:
    door = Door()
    assert {type(door.ask(None)) for _ in range(50)} == {Unauthorised}
    assert not door.limiter.calls
    assert door.recorder.auth_failures == ["missing"] * 50


def test_who_has_a_valid_token_does_not_wait_for_the_limiter() -> None:
    door = Door(slow=True)
    assert door.ask("wrong") is None
    assert door.client("a")
    [(waiting, answer)] = door.limiter.waiting
    waiting.callback(answer)


def test_too_many_invalid_tokens_are_refused_from_the_head(surface: Surface) -> None:
    """The body need not come; and a valid token is let in from the same address."""
    head = b"POST /event HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 16\r\nX-API-Key: "
    for _ in range(10):
        [(status, headers, _)] = surface.http1(head + b"wrong\r\n\r\n")
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
    [(status, headers, body)] = surface.http1(head + b"wrong\r\n\r\n")
    assert (status, json.loads(body)["error"], headers["retry-after"]) == (429, "rate_limited", "30")
    assert "ratelimit" not in headers
    [(status, _, _)] = surface.http1(head + b'secret\r\n\r\n{"content": "x"}')
    assert status == 200


def test_a_token_of_both_places_has_the_name_of_the_file() -> None:
    door = Door()
    door.authenticator.accept(parse_tokens("alice a\nc"))
    assert [door.client(token).name for token in "abc"] == ["alice", None, None]


def test_other_tokens_of_the_settings_leave_those_of_the_file() -> None:
    door = Door()
    door.authenticator.configure(parse_token_list("b,d"))
    assert [isinstance(door.ask(token), Client) for token in "abcd"] == [False, True, True, True]


class Watched:
    """A token file, and what it lets in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.door = Door()
        self.file = TokenFile(str(path), self.door.authenticator)
        self.logged: list[dict[str, Any]] = []
        self.stamp = 10**9

    def write(self, text: str) -> None:
        self.path.write_text(text)
        self.stamp += 10**9
        os.utime(self.path, ns=(self.stamp, self.stamp))

    def reload(self, *, force: bool = False) -> None:
        def in_thread(call: Callable[[], Any]) -> Deferred[Any]:
            return execute(call)

        globalLogPublisher.addObserver(self.logged.append)
        done: list[Any] = []
        Deferred.fromCoroutine(self.file.reload(in_thread, force=force)).addBoth(done.append)
        globalLogPublisher.removeObserver(self.logged.append)
        assert done == [None]

    def accepts(self, token: str) -> bool:
        return isinstance(self.door.ask(token), Client)

    @property
    def errors(self) -> int:
        return len([event for event in self.logged if event["log_level"].name == "error"])


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    found = Watched(tmp_path / "tokens")
    found.write("old\n")
    found.file.load()
    return found


def test_a_changed_file_is_read_again(watched: Watched) -> None:
    assert watched.accepts("old")
    watched.write("new\n")
    watched.reload()
    assert (watched.accepts("new"), watched.accepts("old"), watched.accepts("a")) == (True, False, True)


def test_an_unchanged_file_is_not_read_again(watched: Watched) -> None:
    watched.reload()
    assert watched.logged == []


@pytest.mark.parametrize("text", ["", "# none\n", "bad line here\n", "bob;weight=0 x\n", "old\nbob x\namy x\n", None])
def test_a_broken_file_keeps_the_last_good_tokens_and_is_logged_once(watched: Watched, text: str | None) -> None:
    if text is None:
        watched.path.unlink()
    else:
        watched.write(text)
    for _ in range(3):
        watched.reload()
    assert watched.accepts("old")
    assert watched.errors == 1
    assert "old" not in str(watched.logged[0].get("reason"))
    watched.reload(force=True)
    assert watched.errors == 2
    watched.write("new\n")
    watched.reload()
    assert (watched.accepts("new"), watched.accepts("old")) == (True, False)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_regular_file_holds_nothing_up(watched: Watched, make: Callable[[Path], None]) -> None:
    """To open a named pipe would take until somebody writes to it."""
    watched.path.unlink()
    make(watched.path)
    watched.reload()
    assert watched.accepts("old")
    assert [event["reason"] for event in watched.logged] == ["not a regular file"]
    with pytest.raises(OSError, match="not a regular file"):
        watched.file.load()


def test_one_reading_at_a_time(watched: Watched) -> None:
    """Or an older file could come to be in force after a newer one."""
    started: list[tuple[Deferred[Any], Callable[[], Any]]] = []

    def in_thread(call: Callable[[], Any]) -> Deferred[Any]:
        started.append((Deferred(), call))
        return started[-1][0]

    def finish() -> None:
        waiting, call = started.pop()
        waiting.callback(call())

    readings = [Deferred.fromCoroutine(watched.file.reload(in_thread, force=True)) for _ in range(2)]
    for text in ("one", "two"):
        watched.write(text)
        for _ in range(2):
            assert len(started) == 1
            finish()
        assert watched.accepts(text)
    assert [reading.called for reading in readings] == [True, True]


def test_the_last_token_can_t_be_taken_away() -> None:
    recorder = Recorded()
    authenticator = Authenticator(
        parse_token_list("a"), enabled=True, recorder=recorder, invalid_tokens=FewCalls(1, 60.0)
    )
    with pytest.raises(ValueError, match="no token would be left"):
        authenticator.configure([])
    authenticator.accept(parse_token_list("b"))
    authenticator.configure([])
