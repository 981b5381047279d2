"""Texts that the service reads, whatever is in them: each is understood, or refused as its caller expects."""

import ipaddress
import json
import tempfile
from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ai_ticket.environment import ConfigurationError, load
from ai_ticket.errors import DomainError
from ai_ticket.event import EventLimits, parse_event
from ai_ticket.settings import variables
from ai_ticket.tokens import parse_token_list, parse_tokens
from ai_ticket.web.batch_input import LineSplitter, array_elements
from ai_ticket.web.client_address import client_address, quota_key
from ai_ticket.web.faults import status_of
from fuzz import documents
from fuzz.mutation import mutate, text

LIMITS = EventLimits(4096, 512)

randoms = st.integers(0, 2**32 - 1).map(Random)
addresses = st.one_of(
    st.ip_addresses().map(str),
    st.ip_addresses().map(lambda address: f"[{address}]:80"),
    st.text(st.sampled_from("0123456789abcdef:.[]%, \t"), max_size=60),
    st.binary(max_size=20).map(lambda data: data.decode("latin-1")),
)


def refused(error: DomainError) -> bool:
    return 400 <= status_of(error) < 500


@settings(max_examples=500)
@given(randoms)
def test_an_event_is_understood_only_where_it_is_json(random: Random) -> None:
    body = documents.document(random)
    try:
        event = parse_event(body, LIMITS)
    except DomainError as error:
        assert refused(error)
        return
    found = json.loads(body)
    assert "content" in found
    assert any(message.role == "user" and message.content.strip() for message in event.messages)
    assert 1 <= event.parameters.max_tokens <= LIMITS.max_tokens
    for message in event.messages:
        message.content.encode()  # no half of a character


@settings(max_examples=300)
@given(randoms)
def test_a_batch_is_understood_only_where_it_is_json(random: Random) -> None:
    body = documents.batch(random)
    try:
        elements = array_elements(body, 20)
    except DomainError as error:
        assert refused(error)
        return
    # An event that is not UTF-8 fails alone, when its turn comes.
    assert len(elements) == len(json.loads(body.decode("utf-8", "replace")))


@settings(max_examples=200)
@given(randoms)
def test_lines_are_the_same_however_they_arrive(random: Random) -> None:
    data = documents.batch(random)
    whole, parts = LineSplitter(200), LineSplitter(200)
    expected = [*whole.feed(data), *whole.end()]
    cut = random.randint(0, len(data))
    found = [*parts.feed(data[:cut]), *parts.feed(data[cut:]), *parts.end()]
    assert [element.size for element in found] == [element.size for element in expected]
    assert all(element.size <= 200 for element in found)


@settings(max_examples=80)
@given(st.lists(addresses, max_size=4), st.integers(0, 4))
@example(["1.2.3.4"] * 5000, 4)
@example([","] * 20_000, 2)
def test_a_caller_has_an_address_whatever_proxies_tell(entries: list[str], trusted: int) -> None:
    header = ",".join(entries).encode("latin-1")
    found = client_address("192.0.2.7", header, trusted)
    ipaddress.ip_address(found)
    assert quota_key(found)
    if not trusted:
        assert found == "192.0.2.7"


@settings(max_examples=300)
@given(randoms)
def test_a_token_file_is_read_or_its_line_named(random: Random) -> None:
    """Without a word of what it says: that may be a token."""
    lines = [
        b"canary-%d" % random.randrange(3),
        b"name canary-x",
        b"n;weight=4 canary-y",
        b"sha256:" + b"a" * 64,
        b"# c",
        b"",
        text(random),
    ]
    data = random.choice([b"\n", b"\r\n"]).join(random.choice(lines) for _ in range(random.randint(0, 5)))
    if random.random() < 0.5:
        data = mutate(random, data)
    content = data.decode("utf-8", "replace")
    try:
        tokens = parse_tokens(content)
    except ValueError as error:
        assert "canary" not in str(error)
        assert str(error).startswith("line ") or str(error) == "no token in it"
    else:
        assert tokens
        assert len({token.digest for token in tokens}) == len(tokens)
    parse_token_list(content)


NAMES = sorted(variables())
VALUES = [
    "",
    "0",
    "-1",
    "on",
    "abc",
    "1e400",
    "nan",
    "9" * 400,
    "http://[::1",
    "local:",
    "a,b|c",
    "\u0661",
    "'",
    '"',
    "${X}",
    "/dev/null",
]


@settings(max_examples=300)
@given(randoms)
def test_an_environment_file_is_read_or_its_faults_are_named(random: Random) -> None:
    lines = [f"{random.choice(NAMES)}={random.choice(VALUES)}".encode() for _ in range(random.randint(0, 4))]
    lines += [
        random.choice(
            [b"export A=b", b"A='b\nc'", b'A="b', b"=x", b"A", b"\xff\xfe", b"KOBOLDCPP_PASSWORD=canary", text(random)]
        )
    ]
    data = b"\n".join(lines)
    if random.random() < 0.5:
        data = mutate(random, data)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "env"
        path.write_bytes(data)
        try:
            load({"AI_TICKET_ENV_FILE": str(path), "AI_TICKET_AUTH_TOKEN": "token"})
        except ConfigurationError as error:
            assert error.problems
            assert not [problem for problem in error.problems if "\n" in problem]


def test_a_header_of_proxies_costs_little_however_long_it_is() -> None:
    """16 KiB of it is read only from the right, as far as there are trusted proxies."""
    for entry in (b",", b" ", b"[", b"1.2.3.4,", b"::,"):
        assert client_address("192.0.2.7", entry * 16_384, 2)


@pytest.mark.parametrize("count", [0, 1, 30])
def test_documents_are_of_all_kinds(count: int) -> None:
    """The generator makes what is understood and what is not, or the tests above show little."""
    random = Random(count)
    kinds = set()
    for _ in range(800):
        try:
            parse_event(documents.document(random), LIMITS)
            kinds.add("event")
        except DomainError as error:
            kinds.add(error.code)
    assert {"event", "invalid_request", "invalid_parameter", "prompt_extraction_failed"} <= kinds
