"""KoboldCPP's samplers: sent to it as they are, and to other servers as far as they have the same."""

import json
from typing import Any

import kobold_clients
import pytest
from msgspec.structs import replace

from ai_ticket.backend.dialect import ENDPOINTS
from ai_ticket.backend.probe import KOBOLDCPP, LLAMACPP, OPENAI
from ai_ticket.backend.samplers import SAMPLERS, equivalents, missing
from ai_ticket.errors import UnsupportedParameter
from ai_ticket.event import Event, EventLimits, Parameters
from ai_ticket.interfaces import BackendState
from ai_ticket.web.kobold_requests import read_generate

USUAL = {
    "typical": 1.0,
    "tfs": 1.0,
    "top_a": 0.0,
    "nsigma": 0.0,
    "rep_pen": 1.07,
    "rep_pen_range": 360,
    "rep_pen_slope": 0.7,
    "sampler_order": [6, 0, 1, 3, 4, 2, 5],
    "mirostat": 0,
    "mirostat_tau": 5.0,
    "smoothing_factor": 0.0,
    "smoothing_curve": 1.0,
    "banned_tokens": [],
    "dry_multiplier": 0.0,
    "dry_sequence_breakers": [],
    "ban_eos_token": False,
    "bypass_eos": False,
    "render_special": False,
    "trim_stop": True,
    "grammar": "",
    "logit_bias": {},
}
"""As clients usually send them, most at values that do nothing."""

COMPLETIONS = ENDPOINTS[1]


def texts(fields: dict[str, Any]) -> dict[str, str]:
    return {name: json.dumps(value) for name, value in fields.items()}


def values(found: dict[str, str]) -> dict[str, Any]:
    return {name: json.loads(text) for name, text in found.items()}


@pytest.mark.parametrize("kind", [KOBOLDCPP, None])
def test_koboldcpp_has_them_all(kind: str | None) -> None:
    assert missing(texts(USUAL | {"tfs": 0.5, "render_special": True}), kind, "Once") is None
    assert values(equivalents(texts(USUAL), kind)) == USUAL


def test_llamacpp_gets_what_it_has() -> None:
    """Also what does nothing, for its own default may do something; but no details of what does nothing."""
    assert missing(texts(USUAL), LLAMACPP, "Once") is None
    assert values(equivalents(texts(USUAL), LLAMACPP)) == {
        "typical_p": 1.0,
        "top_n_sigma": 0.0,
        "repeat_penalty": 1.07,
        "repeat_last_n": 360,
        "mirostat": 0,
        "dry_multiplier": 0.0,
        "ignore_eos": False,
        "grammar": "",
        "logit_bias": {},
    }


def test_details_of_what_does_something() -> None:
    dry = {"dry_multiplier": 0.8, "dry_base": 1.75, "dry_allowed_length": 2, "dry_sequence_breakers": ["\n"]}
    assert values(equivalents(texts(dry), LLAMACPP)) == dry
    assert values(equivalents(texts(dry | {"dry_sequence_breakers": []}), LLAMACPP)).keys() == dry.keys() - {
        "dry_sequence_breakers"
    }


@pytest.mark.parametrize(
    ("kind", "fields", "name"),
    [
        (LLAMACPP, {"tfs": 0.9}, "tfs"),
        (LLAMACPP, {"typical": 0.5, "top_a": 0.2}, "top_a"),
        (LLAMACPP, {"banned_tokens": ["x"]}, "banned_tokens"),
        (LLAMACPP, {"render_special": True}, "render_special"),
        (LLAMACPP, {"trim_stop": False}, "trim_stop"),
        (LLAMACPP, {"smoothing_factor": 0.2, "smoothing_curve": 1.0}, "smoothing_factor"),
        (LLAMACPP, {"grammar": "root ::= x", "grammar_retain_state": True}, "grammar_retain_state"),
        (LLAMACPP, {"grammar_retain_state": True}, None),
        (LLAMACPP, {"replace_instruct_placeholders": True}, "replace_instruct_placeholders"),
        (LLAMACPP, {"reasoning_effort": "low"}, "reasoning_effort"),
        (LLAMACPP, {"thinking_budget_tokens": 5}, "thinking_budget_tokens"),
        (LLAMACPP, {"reasoning_effort": "high", "thinking_budget_tokens": -1}, None),
        (OPENAI, {"rep_pen": 1.1}, "rep_pen"),
        (OPENAI, {"rep_pen": 1, "rep_pen_range": 320, "logit_bias": {}}, None),
    ],
)
def test_what_can_not_be_done_elsewhere(kind: str, fields: dict[str, Any], name: str | None) -> None:
    assert missing(texts(fields), kind, "{{[INPUT]}}Hi") == name


def test_placeholders_that_only_a_stop_has() -> None:
    """KoboldAI Lite sends them with every prompt; without being replaced they are stops that never come."""
    lite = read_generate(json.dumps(kobold_clients.LITE).encode(), EventLimits(100, 50), stream=False)
    assert "replace_instruct_placeholders" in lite.extra
    server = BackendState("a", True, 1, LLAMACPP)
    COMPLETIONS.check(lite, server)
    assert "replace_instruct_placeholders" not in COMPLETIONS.payload(lite, "k", LLAMACPP)
    assert "replace_instruct_placeholders" in COMPLETIONS.payload(lite, "k", KOBOLDCPP)
    with pytest.raises(UnsupportedParameter) as caught:
        COMPLETIONS.check(replace(lite, raw_prompt="{{[INPUT]}}Hi{{[OUTPUT]}}"), server)
    assert caught.value.details == "replace_instruct_placeholders"


def test_every_detail_is_one_of_something() -> None:
    for sampler in SAMPLERS.values():
        assert sampler.of is None or sampler.of in SAMPLERS


def test_at_an_endpoint() -> None:
    event = Event(
        [], Parameters(5, seed=1, stop=["x"]), raw_prompt="Once", extra=texts({"mirostat": 2, "rep_pen": 1.1})
    )
    server = BackendState("a", True, 1, LLAMACPP)
    to_llamacpp = COMPLETIONS.payload(event, "k", LLAMACPP)
    assert {"mirostat", "repeat_penalty", "seed", "stop"} <= to_llamacpp.keys()
    assert {"mirostat_mode", "rep_pen"} <= COMPLETIONS.payload(event, "k", KOBOLDCPP).keys()
    assert {"mirostat", "rep_pen", "sampler_seed"} <= ENDPOINTS[2].payload(event, "k", KOBOLDCPP).keys()
    COMPLETIONS.check(event, server)
    with pytest.raises(Exception, match="tfs"):
        COMPLETIONS.check(replace(event, extra={"tfs": "0.5"}), server)
