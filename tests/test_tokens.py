"""What a token file and AI_TICKET_AUTH_TOKEN say."""

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_ticket.cli import token_file
from ai_ticket.tokens import Line, Token, merge, parse_token_list, parse_tokens

HEX = sha256(b"three").hexdigest()


def token(text: str, name: str | None = None, weight: int = 1) -> Token:
    return Token(sha256(text.encode()).digest(), name, weight)


def test_lines_of_a_token_file() -> None:
    text = f"\ufeff# comment\r\n\n one \nbob two\nsha256:{HEX}\n\tcarol;weight=4  four\r\n"
    text += f"dave;weight=100 sha256:{'AB' * 32}"
    assert parse_tokens(text) == [
        token("one"),
        token("two", "bob"),
        token("three"),
        token("four", "carol", 4),
        Token(bytes.fromhex("ab" * 32), "dave", 100),
    ]


def test_a_byte_order_mark_is_no_part_of_the_first_line() -> None:
    assert parse_tokens("\ufeffbob one") == [token("one", "bob")]


def test_what_stands_after_a_semicolon_belongs_to_a_name_alone() -> None:
    assert parse_tokens("one;weight=4") == [token("one;weight=4")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no token"),
        ("# only\n\n", "no token"),
        ("ok\na b secret", "line 2: more than"),
        ("bad/name secret", "line 1: a name"),
        (";weight=4 secret", "line 1: a name"),
        ("x" * 65 + " secret", "line 1: a name"),
        ("bob sha256:secret", "line 1: sha256:"),
        ("bob;weight=1 sha256:" + "0" * 63, "line 1: sha256:"),
        ("ok\nbob; secret", "line 2: after ;"),
        ("bob;weight secret", "line 1: after ;"),
        ("bob;weight= secret", "line 1: after ;"),
        ("bob;weight=1;weight=2 secret", "line 1: after ;"),
        ("bob;secret=4 secret", "line 1: after ;"),
        ("bob;weight=4;secret secret", "line 1: after ;"),
        ("bob;WEIGHT=4 secret", "line 1: after ;"),
        ("bob;weight=+4 secret", "line 1: after ;"),
        ("bob;weight=1.5 secret", "line 1: after ;"),
        ("bob;weight=٤ secret", "line 1: after ;"),
        ("bob;weight=0 secret", "line 1: a weight"),
        ("bob;weight=101 secret", "line 1: a weight"),
        ("bob;weight=" + "9" * 9999 + " secret", "line 1: after ;"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_without_its_content(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_tokens(text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["secret\nbob;weight=2 secret", "bob;weight=2 secret\nsecret", "bob;weight=2 secret\n" * 2]
)
def test_a_token_twice_counts_once_under_its_name(text: str) -> None:
    assert parse_tokens(text) == [token("secret", "bob", 2)]


@pytest.mark.parametrize(
    "other", ["alice secret", "bob;weight=2 secret", f"alice sha256:{sha256(b'secret').hexdigest()}"]
)
def test_a_token_of_two_names_or_weights_is_an_error(other: str) -> None:
    with pytest.raises(ValueError, match="line 3: the token of line 2 with another name or weight") as caught:
        parse_tokens(f"\nbob secret\n{other}\n")
    assert "secret" not in str(caught.value)


def test_a_name_may_have_several_tokens() -> None:
    """While one takes the place of the other, say. They are told apart."""
    old, new = parse_tokens("bob old\nbob new")
    assert old.name == new.name
    assert old.key != new.key


def test_the_tokens_of_the_environment_are_taken_as_they_are() -> None:
    assert parse_token_list(" one,, two words ,sha256:00,bob;weight=2") == [
        token("one"),
        token("two words"),
        token("sha256:00"),
        token("bob;weight=2"),
    ]
    assert parse_token_list(" , ") == []
    assert parse_token_list("\udcff")[0].digest == sha256(b"\xff").digest()


def test_of_the_same_token_in_both_places_the_file_gives_the_name() -> None:
    assert merge(parse_token_list("one,two"), parse_tokens("bob;weight=3 two\nthree")) == [
        token("one"),
        token("two", "bob", 3),
        token("three"),
    ]


@given(st.text(alphabet="ab \t;=weight49#:\ufeff\r\x0b\xa0\x00", max_size=40))
def test_service_and_command_line_read_a_line_alike(text: str) -> None:
    """What the one takes for a name's token the other does not overlook, or there would soon be two of that name."""
    try:
        [strict] = parse_tokens(text)
    except ValueError:
        return
    [lenient] = token_file.lines_of(text)
    assert lenient.token() == strict


@given(st.builds(Line, st.text("ab1;", min_size=1), st.text("abc", min_size=1), st.none() | st.just("weight=7")))
def test_a_written_line_is_read_as_it_was(line: Line) -> None:
    assert token_file.parse(line.text) == line
