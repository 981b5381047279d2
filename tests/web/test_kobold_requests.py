"""What KoboldCPP's clients ask for, read into events."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kobold_clients import LITE, TAVERN, TAVERN_TEXT

from ai_ticket.errors import DomainError, InvalidParameter, InvalidRequest, UnsupportedParameter
from ai_ticket.event import Event, EventLimits
from ai_ticket.web.kobold_requests import is_tavern, read_generate, read_tavern

LIMITS = EventLimits(100, 50)


def read(**fields: Any) -> Event:
    return read_generate(json.dumps({"prompt": "Once"} | fields).encode(), LIMITS, stream=False)


def test_lite() -> None:
    event = read(**LITE)
    assert (event.raw_prompt, event.key, event.max_tokens_given) == ("A kobold.\nOnce", "KCPP4711", True)
    parameters = event.parameters
    assert (parameters.max_tokens, parameters.temperature, parameters.top_p, parameters.top_k) == (80, 0.75, 0.92, 100)
    assert parameters.stop == ["{{[INPUT]}}", "{{[OUTPUT]}}"]
    assert event.extra == {
        name: json.dumps(value, separators=(",", ":"))
        for name, value in {
            "typical": 1.0,
            "tfs": 1.0,
            "top_a": 0.0,
            "nsigma": 0.0,
            "rep_pen": 1.07,
            "rep_pen_range": 360,
            "rep_pen_slope": 0.7,
            "sampler_order": [6, 0, 1, 3, 4, 2, 5],
            "presence_penalty": 0.0,
            "dynatemp_range": 0.0,
            "dynatemp_exponent": 1.0,
            "smoothing_factor": 0.0,
            "banned_tokens": [],
            "logit_bias": {},
            "ban_eos_token": False,
            "bypass_eos": False,
            "render_special": False,
            "trim_stop": True,
            "replace_instruct_placeholders": True,
        }.items()
    }


def test_tavern() -> None:
    event = read(**TAVERN)
    assert (event.parameters.seed, event.parameters.top_k, event.parameters.top_p) == (None, 0, 1.0)
    assert {"use_story", "max_context_length", "quiet"}.isdisjoint(event.extra)
    assert event.extra["mirostat_tau"] == "5.0"


def test_tavern_at_openais_surface() -> None:
    body = json.dumps(TAVERN_TEXT).encode()
    assert is_tavern(body)
    event = read_tavern(body, LIMITS)
    assert (event.raw_prompt, event.stream, event.chunks, event.key) == ("Once", True, None, "")
    parameters = event.parameters
    assert (parameters.max_tokens, parameters.stop, parameters.seed) == (80, ["\nAnne:"], None)
    assert (event.extra["banned_tokens"], event.extra["rep_pen"]) == ('["suddenly"]', "1.1")
    with pytest.raises(InvalidParameter, match="max_tokens must be from 1 to 100"):
        read_tavern(json.dumps(TAVERN_TEXT | {"max_tokens": 101}).encode(), LIMITS)


@pytest.mark.parametrize(
    "fields",
    [{"prompt": "Once"}, {"prompt": '"api_type": "koboldcpp"'}, {"prompt": "Once", "api_type": "ooba"}],
)
def test_others_are_read_as_openais(fields: dict[str, Any]) -> None:
    assert not is_tavern(json.dumps(fields).encode())


def test_next_to_nothing() -> None:
    event = read()
    assert (event.parameters.max_tokens, event.max_tokens_given, event.key) == (50, False, "")
    assert (event.extra, event.parameters.stop) == ({}, None)


def test_null_is_as_good_as_absent() -> None:
    assert read(**dict.fromkeys(LITE.keys() - {"prompt"})) == read()


def test_placeholders() -> None:
    """Lite asks for them to be replaced also where there are none, which any server can do."""
    for fields in ({"prompt": "{{[INPUT]}}Hi"}, {"stop_sequence": ["{{[INPUT]}}"]}):
        assert read(replace_instruct_placeholders=True, **fields).extra == {"replace_instruct_placeholders": "true"}
    assert read(replace_instruct_placeholders=True, stop_sequence=["END"]).extra == {}


def test_one_of_several_names() -> None:
    assert read(use_default_badwordsids=True).extra == {"ban_eos_token": "true"}
    assert read(use_default_badwordsids=True, ban_eos_token=False).extra == {"ban_eos_token": "false"}
    for name in ("repetition_penalty", "repeat_penalty"):
        assert read(**{name: 1.1}).extra == {"rep_pen": "1.1"}
    assert read(repetition_penalty=1.2, rep_pen=1.1, repeat_penalty=1.3).extra == {"rep_pen": "1.1"}
    assert read(banned_strings=["suddenly"]).extra == {"banned_tokens": '["suddenly"]'}
    assert read(banned_strings=["suddenly"], banned_tokens=[]).extra == {"banned_tokens": '["suddenly"]'}
    assert read(banned_strings=["suddenly"], banned_tokens=["a"]).extra == {"banned_tokens": '["a"]'}


def test_banned_tokens_by_their_numbers() -> None:
    """As SillyTavern has them."""
    assert read(custom_token_bans="").extra == {}
    assert read(custom_token_bans="15, 16,").extra == {"logit_bias": '{"15":-100.0,"16":-100.0}'}
    biased = read(custom_token_bans="15", logit_bias={"15": 5, "17": 3})
    assert biased.extra == {"logit_bias": '{"15":-100.0,"17":3.0}'}
    tavern = read_tavern(json.dumps(TAVERN_TEXT | {"custom_token_bans": "15"}).encode(), LIMITS)
    assert tavern.extra["logit_bias"] == '{"15":-100.0}'


def test_how_much_to_think() -> None:
    """KoboldCPP takes that for a text as well."""
    thought = read(reasoning_effort="low", thinking_budget_tokens=100)
    assert thought.extra == {"reasoning_effort": '"low"', "thinking_budget_tokens": "100"}


def test_stops() -> None:
    assert read(stop_sequence="END").parameters.stop == ["END"]
    assert read(stop_sequence=["", "a", "\n"]).parameters.stop == ["a", "\n"]
    assert read(stop_sequence=[""]).parameters.stop is None
    assert len(read(stop_sequence=[str(number) for number in range(200)]).parameters.stop or []) == 200


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": None}, "prompt: Expected `str`"),
        ({"prompt": ["Once"]}, "prompt: Expected `str`"),
        ({"prompt": ""}, "prompt: there must be one"),
        ({"max_length": 0}, "max_length must be from 1 to 100"),
        ({"max_length": 101}, "max_length must be from 1 to 100"),
        ({"max_length": "abc"}, "max_length: Expected `int"),
        ({"max_length": True}, "max_length: Expected `int"),
        ({"max_context_length": 0}, "max_context_length: Expected"),
        ({"temperature": 6}, "temperature: Expected"),
        ({"temperature": -1}, "temperature: Expected"),
        ({"top_p": 1.1}, "top_p: Expected"),
        ({"rep_pen": "x"}, "rep_pen: Expected"),
        ({"rep_pen_range": -1}, "rep_pen_range: Expected"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias: Expected"),
        ({"rep_pen": 1e9}, "rep_pen: Expected"),
        ({"mirostat": 3}, "mirostat: Expected"),
        ({"sampler_seed": 2**32}, "sampler_seed: Expected"),
        ({"stop_sequence": [1]}, "stop_sequence[0]: Expected"),
        ({"stop_sequence": {}}, "stop_sequence: Expected"),
        ({"banned_tokens": "x"}, "banned_tokens: Expected"),
        ({"logit_bias": {"hello": 1}}, "logit_bias must name tokens by their numbers"),
        ({"logit_bias": {"1": "x"}}, "logit_bias"),
        ({"custom_token_bans": "15,x"}, "custom_token_bans must name tokens by their numbers"),
        ({"custom_token_bans": [15]}, "custom_token_bans: Expected"),
        ({"thinking_budget_tokens": -2}, "thinking_budget_tokens: Expected"),
        ({"genkey": 5}, "genkey: Expected"),
        ({"genkey": "x" * 129}, "genkey: Expected"),
        ({"grammar": 5}, "grammar: Expected"),
        ({"trim_stop": "yes"}, "trim_stop: Expected"),
    ],
)
def test_what_would_make_a_real_one_fail_oddly(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        read(**fields)
    assert caught.value.message.startswith(says)


@pytest.mark.parametrize("fields", [{"n": 2}, {"images": ["aGk="]}, {"audio": ["aGk="]}])
def test_what_can_not_be_done(fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        read(**fields)
    assert [caught.value.details] == list(fields)


@pytest.mark.parametrize("body", [b"", b"{", b'{"prompt": "x" "y"}', b'{"prompt": "\xff"}'])
def test_what_is_no_json(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read_generate(body, LIMITS, stream=False)


@pytest.mark.parametrize("body", [b"[]", b'"x"', b"5", b"null"])
def test_what_is_no_object(body: bytes) -> None:
    with pytest.raises(InvalidParameter):
        read_generate(body, LIMITS, stream=False)


@given(
    st.dictionaries(
        st.sampled_from(sorted(LITE | TAVERN)),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text() | st.integers()),
    )
)
def test_whatever_comes(fields: dict[str, Any]) -> None:
    """It is read or refused; an event's further fields are JSON texts."""
    try:
        event = read_generate(json.dumps(fields).encode(), LIMITS, stream=True)
    except DomainError:
        return
    assert event.raw_prompt
    assert 1 <= event.parameters.max_tokens <= 100
    for text in event.extra.values():
        json.loads(text)
