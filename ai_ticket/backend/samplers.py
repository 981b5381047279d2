"""KoboldCPP's ways of choosing tokens, and what other servers have in their place. Pure.

Clients send dozens of them with every request, most at a value that does nothing. So what a server has no equivalent
of is left out where it would do nothing, and refused where it would do something.
"""

from collections.abc import Mapping

import msgspec
from msgspec import Struct

from ai_ticket.backend.probe import LLAMACPP, OPENAI


class Sampler(Struct, frozen=True):
    """One of them. `llamacpp` is what llama.cpp calls the same, if it has it.

    With one of the `neutral` values it does nothing, nor where the one that it is a detail `of` does nothing. A `hint`
    only refines what is done anyway: it is left out without a word. So is what is for a `mark` that the prompt has not.
    """

    llamacpp: str | None = None
    neutral: tuple[object, ...] = ()
    of: str | None = None
    hint: bool = False
    mark: str = ""


SAMPLERS = {
    "typical": Sampler("typical_p", (1,)),
    "tfs": Sampler(None, (1,)),
    "top_a": Sampler(None, (0,)),
    "nsigma": Sampler("top_n_sigma", (0,)),
    "rep_pen": Sampler("repeat_penalty", (1,)),
    "rep_pen_range": Sampler("repeat_last_n", of="rep_pen"),
    "rep_pen_slope": Sampler(hint=True),
    "sampler_order": Sampler(hint=True),
    "mirostat": Sampler("mirostat", (0,)),
    "mirostat_tau": Sampler("mirostat_tau", of="mirostat"),
    "mirostat_eta": Sampler("mirostat_eta", of="mirostat"),
    "dynatemp_range": Sampler("dynatemp_range", (0,)),
    "dynatemp_exponent": Sampler("dynatemp_exponent", of="dynatemp_range"),
    "smoothing_factor": Sampler(None, (0,)),
    "smoothing_curve": Sampler(None, of="smoothing_factor"),
    "xtc_probability": Sampler("xtc_probability", (0,)),
    "xtc_threshold": Sampler("xtc_threshold", of="xtc_probability"),
    "dry_multiplier": Sampler("dry_multiplier", (0,)),
    "dry_base": Sampler("dry_base", of="dry_multiplier"),
    "dry_allowed_length": Sampler("dry_allowed_length", of="dry_multiplier"),
    "dry_penalty_last_n": Sampler("dry_penalty_last_n", of="dry_multiplier"),
    "dry_sequence_breakers": Sampler("dry_sequence_breakers", ([],), of="dry_multiplier"),
    "adaptive_target": Sampler("adaptive_target", (-1,)),
    "adaptive_decay": Sampler("adaptive_decay", of="adaptive_target"),
    "guidance_scale": Sampler(None, (1,)),
    "negative_prompt": Sampler(None, ("",), of="guidance_scale"),
    "grammar": Sampler("grammar", ("",)),
    "grammar_retain_state": Sampler(None, (False,), of="grammar"),
    "banned_tokens": Sampler(None, ([],)),
    "ban_eos_token": Sampler("ignore_eos", (False,)),
    "bypass_eos": Sampler(None, (False,)),
    "render_special": Sampler(None, (False,)),
    "trim_stop": Sampler(None, (True,)),
    "replace_instruct_placeholders": Sampler(None, (False,), mark="{{["),
    "singleline": Sampler(None, (False,)),
    "reasoning_effort": Sampler(None, ("", "auto", "high", "xhigh", "max")),
    "thinking_budget_tokens": Sampler(None, (-1,)),
}


def equivalents(extra: Mapping[str, str], kind: str | None) -> dict[str, str]:
    """An event's further fields (`Event.extra`) by the names that a server of this kind has for them, if it has one."""
    if kind not in (LLAMACPP, OPENAI):
        return dict(extra)
    found = {}
    for name, text in extra.items():
        sampler = SAMPLERS.get(name)
        if sampler is None:
            found[name] = text
        elif kind == LLAMACPP and sampler.llamacpp is not None and (sampler.of is None or _active(name, extra)):
            found[sampler.llamacpp] = text
    return found


def missing(extra: Mapping[str, str], kind: str | None, prompt: str) -> str | None:
    """The first of them that would do something to this prompt, and that such a server has no equivalent of."""
    if kind not in (LLAMACPP, OPENAI):
        return None
    for name in extra:
        sampler = SAMPLERS.get(name)
        if sampler is None or sampler.hint or (kind == LLAMACPP and sampler.llamacpp is not None):
            continue
        if sampler.mark in prompt and _active(name, extra):
            return name
    return None


def _active(name: str, extra: Mapping[str, str]) -> bool:
    """Whether it would do something."""
    sampler = SAMPLERS[name]
    if name not in extra or msgspec.json.decode(extra[name]) in sampler.neutral:
        return False
    return sampler.of is None or _active(sampler.of, extra)
