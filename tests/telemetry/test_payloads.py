"""Sample payloads: few, short, and none of them with a credential that was planted there."""

import json
import time
from contextlib import nullcontext
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError
from twisted.internet.task import Clock
from twisted.logger import capturedLogs

from ai_ticket.errors import MissingContentField
from ai_ticket.settings import variables
from ai_ticket.telemetry.payloads import (
    HIDDEN,
    LONGEST,
    RUN,
    PayloadSampler,
    payloads_a_minute,
    shown,
    without_credentials,
)

# What is planted. A password has letters that no filler, name or format has, so that its remains are recognised.
PASSWORD = st.text("ΩЖ漢#%~;:!?(){}[]<>@&*^|', .-_/", min_size=1, max_size=30).map(lambda text: f"Ω{text}Ж")
QUOTED = PASSWORD | st.text("Ω\"\\n,}]' ", min_size=1, max_size=12).map(lambda text: f"Ω{text}Ж")
RANDOM = st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789", min_size=RUN, max_size=80)
SHORT = st.text("ABCDEFGHXYZabcdefghxyz0123456789", min_size=8, max_size=30)
NAMES = st.sampled_from(
    "password PASSWORD userPassword passwd db_pwd passphrase token accessToken refresh_token auth_token secret "
    "client_secret AWS_SECRET_ACCESS_KEY api_key apikey api-key X-API-Key authorization Authorization "
    "Proxy-Authorization private_key Cookie session_id credentials token1".split()
)
KEYS = st.one_of(
    st.tuples(st.sampled_from(["sk-", "sk-proj-", "sk_live_", "hf_", "ghp_", "github_pat_", "glpat-", "npm_"]), SHORT),
    st.tuples(st.sampled_from(["AKIA", "ASIA"]), st.text("ABCDEFGHIJ234567", min_size=16, max_size=16)),
    st.tuples(
        st.sampled_from(["xoxb-", "AIza", "ya29.", "SG.", "whsec_", "eyJ", "Bearer ", "bearer  ", "Basic "]), SHORT
    ),
).map("".join)
BLOCKS = RANDOM.map(lambda text: f"-----BEGIN RSA PRIVATE KEY-----\n{text}\n{text[:9]}\n-----END RSA PRIVATE KEY-----")
BARE = st.one_of(
    KEYS,
    BLOCKS,
    RANDOM,
    st.text("0123456789abcdef", min_size=32, max_size=64),
    st.text("ABCxyz019+/", min_size=RUN, max_size=60).map(lambda text: text + "=="),
    st.tuples(SHORT, SHORT, SHORT).map(lambda parts: "eyJ" + ".".join(parts)),
    st.tuples(SHORT, SHORT).map(lambda parts: f"https://{parts[0]}:{parts[1]}@"),
)
FILLER = st.text('klmno rstuv \n,.öß\\"', max_size=60)


def remains(secret: str, text: str) -> str | None:
    """A piece of the secret that is still there, if any: eight characters of it, or all of a short one."""
    secret = secret.removeprefix("https://").rstrip("@= ")
    for begin in ("Bearer ", "bearer  ", "Basic ", "-----BEGIN RSA PRIVATE KEY-----\n"):
        secret = secret.removeprefix(begin)
    secret = secret.removesuffix("\n-----END RSA PRIVATE KEY-----")
    size = min(8, len(secret))
    pieces = (secret[at : at + size] for at in range(len(secret) - size + 1))
    return next((piece for piece in pieces if piece in text), None)


@st.composite
def documents(draw: st.DrawFn, value: str) -> Any:
    """Something of JSON with this value in it."""
    found: Any = value
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["list", "object", "text"]))
        if kind == "list":
            found = [draw(FILLER), found]
        elif kind == "object":
            found = {"prompt": draw(FILLER), draw(st.sampled_from(["content", "x"])): found, "last": 1}
        else:
            found = json.dumps(found, ensure_ascii=draw(st.booleans()))
    return found


@given(st.data())
def test_no_credential_survives_wherever_in_json_it_is(data: st.DataObject) -> None:
    secret = data.draw(BARE)
    before = data.draw(st.sampled_from(["", "text ", "text\n", '"', "(", "key: ", "=", "=" * 30, "a" * 25 + "="]))
    document = data.draw(documents(before + secret + data.draw(st.sampled_from(["", " more", "\nmore", '"']))))
    body = json.dumps(document, indent=data.draw(st.none() | st.just(2))).encode()
    assert remains(secret, shown(body) or "") is None


@given(st.data())
def test_no_value_survives_under_a_name_that_tells(data: st.DataObject) -> None:
    secret, name = data.draw(QUOTED), data.draw(NAMES)
    value: Any = data.draw(st.sampled_from([secret, [secret], {"value": secret}, [["x"], secret]]))
    planted = data.draw(st.sampled_from([{name: value}, {name: value, "x": 1}, {"name": name, "value": secret}]))
    for _ in range(data.draw(st.integers(0, 3))):
        planted = json.dumps({"content": planted, "last": 1}, ensure_ascii=False)
    body = json.dumps(planted, indent=data.draw(st.none() | st.just(2)), ensure_ascii=False).encode()
    text = shown(body)
    assert text is not None
    assert "Ω" not in text
    assert "Ж" not in text


@given(NAMES, PASSWORD, st.sampled_from([": ", "=", " = ", ":", " => "]), st.booleans())
def test_no_value_survives_in_a_header_or_assignment(name: str, secret: str, sign: str, in_json: bool) -> None:
    text = f"Hello\n{name}{sign}{secret}\nmore"
    found = shown(json.dumps({"prompt": text}, ensure_ascii=False).encode() if in_json else text.encode())
    assert found is not None
    assert "Ω" not in found
    assert "Ж" not in found
    assert "more" in found


@given(st.integers(-200, 40), st.data())
def test_nor_where_the_payload_is_cut(shift: int, data: st.DataObject) -> None:
    """Half a credential is one that its pattern may no longer know."""
    secret = data.draw(BARE)
    limit = data.draw(st.sampled_from([LONGEST, 2 * LONGEST]))
    body = ("lorem " * 2000)[: limit + shift] + " " + secret + " lorem" * 2000
    found = shown(body.encode())
    assert found is not None
    assert len(found) <= LONGEST
    assert remains(secret, found) is None


@given(st.data())
def test_nor_where_hidden_parts_before_it_make_room(data: st.DataObject) -> None:
    secret = data.draw(KEYS)
    body = "A" * (2 * LONGEST - 60) + " " + "x" * data.draw(st.integers(0, 60)) + " " + secret + " lorem" * 99
    assert remains(secret, shown(body.encode()) or "") is None


@pytest.mark.parametrize(
    "body",
    [
        rb'{"pass\u0077ord": "canary", "a": 1}',
        rb'{"content": "{\u0022password\u0022: \u0022canary\u0022}"}',
        rb'{"content": "\u0073\u006b-canarycanary"}',
        rb'{"content": "AAAAAAAAAAA\/BBBBBBBBBBBBcanary"}',
        rb'{"password": "can\"canary", "a": 1}',
        rb'{"password": "can\\", "token": "canary"}',
        rb'{"password":canary',
        rb'{"password":"canary',
        b"{'password': 'canary'}",
        b'{"token" :\n\t"canary"}',
        b'{"token": 12345.canary}',
        b'["password", "canary"]',
        b'[["X-API-Key", "canary"]]',
        b'{"auth": {"user": "u", "x": "canary"}}',
        b'{"headers": {"Authorization": "Digest canary"}}',
        b"curl -H 'Authorization: Bearer canary' https://x",
        b"curl -H 'X-Api-Key: canary'",
        b"https://user:canary@host/path",
        b"https://canary@host/path",
        b"https://host/?api_key=canary&x=1",
        b"export OPENAI_API_KEY=canary",
    ],
)
def test_ways_to_write_a_credential(body: bytes) -> None:
    found = shown(body)
    assert found is not None
    assert HIDDEN in found
    assert "canary" not in found


@pytest.mark.parametrize(
    "text",
    [
        '{"content": "Tell me a story of a task-oriented author, please.", "parameters": {"max_tokens": 50}}',
        '{"usage": {"prompt_tokens": 1, "completion_tokens": 22}, "author": "Bob", "authors": ["Bob"]}',
        '{"stream": true, "use_token": null, "seed": 1234567890}',
        '{"content": [{"role": "user", "content": "Hi\\nthere"}], "temperature": 0.7}',
        "--------------------------------",
        '{"content": "broken',
    ],
)
def test_what_is_none_is_shown(text: str) -> None:
    assert shown(text.encode()) == text


def test_what_is_not_text_is_not_shown() -> None:
    for body in (b"\xff\xfe", '{"token": "canary"}'.encode("utf-16-le"), b"\x1f\x8b\x08", b"a\x00b"):
        assert shown(body) is None
    assert shown("ö".encode() * LONGEST * 2) == ""  # one word, cut
    assert shown("ö ".encode() * LONGEST) == "ö " * (LONGEST // 2)
    assert shown(b"a\tb\r\n") == "a\tb\r\n"


@given(st.text("pasword token\\\"':=,[]{}-/@BEGIN eyJ.:\n", max_size=300))
@example("token" * 60)
def test_any_text_is_dealt_with(text: str) -> None:
    assert isinstance(without_credentials(text), str)


SLOW = r"""token token\ token" token=\\ :// ://a@ \ \" sk- a _ - key eyJ password\n \u0041 \\u0022 "token":" auth %"""


@pytest.mark.parametrize("piece", [*SLOW.split(), "token: ", "-----BEGIN ", "basic ", " ", "\n"])
def test_no_payload_takes_long(piece: str) -> None:
    """No pattern takes more than a little of the reactor's time, whatever a caller sends."""
    text = piece * (2 * LONGEST // len(piece))
    began = time.process_time()
    without_credentials(text)
    assert time.process_time() - began < 0.1


@given(st.text(max_size=8) | st.sampled_from(["off", "OFF", "sample:1", "Sample:9999", "sample:0", "sample:10000"]))
def test_the_setting_and_its_meaning_agree(text: str) -> None:
    import msgspec

    try:
        msgspec.convert(text, variables()["LOG_PAYLOADS"].type)
    except msgspec.ValidationError:
        with pytest.raises(ValueError, match="off, or sample:N"):
            payloads_a_minute(text)
    else:
        assert payloads_a_minute(text) >= 0


def test_the_setting() -> None:
    assert [payloads_a_minute(text) for text in ("off", "OFF", "sample:5", "SAMPLE:9999")] == [0, 0, 5, 9999]


class Sampled:
    """A sampler and what it logs."""

    def __init__(self, a_minute: int) -> None:
        self.clock = Clock()
        self.wanted = True
        self.sampler = PayloadSampler(a_minute, self.clock, lambda: self.wanted)

    def sampled(self, count: int) -> int:
        with capturedLogs() as events:
            for _ in range(count):
                self.sampler.sample("r1", "/event", b"{}", "ok")
        return len(events)


def test_so_many_within_any_minute() -> None:
    found = Sampled(3)
    assert found.sampled(2) == 2
    found.clock.advance(30)
    assert found.sampled(2) == 1
    found.clock.advance(30)
    assert found.sampled(5) == 2
    found.clock.advance(30)
    assert found.sampled(5) == 1


def test_none_unless_asked_for() -> None:
    assert Sampled(0).sampled(5) == 0
    found = Sampled(5)
    found.wanted = False
    assert found.sampled(5) == 0
    found.wanted = True
    assert found.sampled(9) == 5


def test_the_number_can_be_changed() -> None:
    found = Sampled(2)
    assert found.sampled(9) == 2
    found.sampler.a_minute = 3
    assert found.sampled(9) == 1
    found.sampler.a_minute = 0
    assert found.sampled(9) == 0
    found.sampler.a_minute = 1
    assert found.sampled(9) == 1


def test_a_line() -> None:
    with capturedLogs() as events:
        Sampled(1).sampler.sample("r1", "/event", b'{"token": "canary"}', "missing_content_field")
    [event] = events
    assert event["log_level"].name == "debug"
    assert event["log_format"].format_map(event) == "payload of /event: missing_content_field"
    assert (event["request_id"], event["size"], event["payload"]) == ("r1", 19, f'{{"token": "{HIDDEN}"}}')


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "ok"),
        (MissingContentField(), "missing_content_field"),
        (CancelledError(), "cancelled"),
        (RuntimeError("a bug"), "internal_error"),
    ],
)
def test_what_became_of_it(error: Exception | None, outcome: str) -> None:
    def answer() -> None:
        with Sampled(1).sampler.sampling("r1", "/event", b"{}"):
            if error is not None:
                raise error

    with capturedLogs() as events, pytest.raises(type(error)) if error else nullcontext():
        answer()
    assert [event["outcome"] for event in events] == [outcome]
