"""Tokens, and the file that they are read from."""

import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from harness import Recorded
from twisted.internet.defer import Deferred, execute
from twisted.logger import globalLogPublisher

from ai_ticket.web.auth import Authenticator, TokenFile, parse_token_list, parse_tokens
from ai_ticket.web.faults import Unauthorised
from ai_ticket.web.request import Request


def request(token: str) -> Request:
    return Request(
        None,  # type: ignore[arg-type]
        method="POST",
        target=b"/event",
        version="1.1",
        headers={b"x-api-key": token.encode()},
        peer="192.0.2.1",
        secure=True,
        arrived=0.0,
    )


def test_lines_of_a_token_file() -> None:
    digest = sha256(b"three").hexdigest()
    text = f"# comment\n\n one \nbob two\nsha256:{digest}\ncarol sha256:{digest.upper()}\n"
    found = parse_tokens(text)
    assert [token.name for token in found] == [None, "bob", None, "carol"]
    assert [token.digest for token in found] == [
        sha256(b"one").digest(),
        sha256(b"two").digest(),
        sha256(b"three").digest(),
        sha256(b"three").digest(),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no token"),
        ("# only\n\n", "no token"),
        ("ok\na b secret", "line 2"),
        ("bad/name secret", "line 1"),
        ("x" * 65 + " secret", "line 1"),
        ("bob sha256:secret", "line 1"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_without_its_content(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_tokens(text)
    assert "secret" not in str(caught.value)


def test_clients_are_told_apart_without_giving_away_their_tokens() -> None:
    authenticator = Authenticator(parse_token_list("a,b"), enabled=True, recorder=Recorded())
    authenticator.accept(parse_tokens("bob c"))
    clients = [authenticator.authenticate(request(token)) for token in "abc"]
    assert len({client.key for client in clients}) == 3
    assert [client.name for client in clients] == [None, None, "bob"]
    assert all(client.address == "192.0.2.1" for client in clients)


def test_without_authentication_clients_are_addresses() -> None:
    authenticator = Authenticator([], enabled=False, recorder=Recorded())
    assert authenticator.authenticate(request("anything")).key == "192.0.2.1"


class Watched:
    """A token file, and what it lets in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.authenticator = Authenticator(parse_token_list("fixed"), enabled=True, recorder=Recorded())
        self.file = TokenFile(str(path), self.authenticator)
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
        try:
            self.authenticator.authenticate(request(token))
        except Unauthorised:
            return False
        return True

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
    assert (watched.accepts("new"), watched.accepts("old"), watched.accepts("fixed")) == (True, False, True)


def test_an_unchanged_file_is_not_read_again(watched: Watched) -> None:
    watched.reload()
    assert watched.logged == []


@pytest.mark.parametrize("text", ["", "# none\n", "bad line here\n", None])
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
