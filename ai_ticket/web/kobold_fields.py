"""The fields of KoboldCPP's requests, and what each may be. `null` counts as absent; what is not here is ignored.

Clients send dozens of them, and with each version some more: what KoboldCPP itself does not know it ignores as well.
"""

from typing import Annotated

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from ai_ticket.event import LARGEST_SEED

Number = Annotated[float, Meta(ge=-1_000_000, le=1_000_000)]
Amount = Annotated[float, Meta(ge=0, le=1_000_000)]
Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=0, le=1_048_576)]
"""Of tokens: more than any context has, and not so many that a server can't keep as many."""

Repetition = Annotated[float, Meta(ge=0, le=100)]
Texts = Annotated[list[str], Meta(max_length=1024)]


class Samplers(Struct, kw_only=True):
    """What KoboldCPP does in choosing tokens, beyond what every server does. All of it is passed on."""

    typical: Share | None = None
    tfs: Share | None = None
    top_a: Amount | None = None
    nsigma: Number | None = None
    rep_pen: Repetition | None = None
    rep_pen_range: Count | None = None
    rep_pen_slope: Amount | None = None
    sampler_order: Annotated[list[Annotated[int, Meta(ge=0, le=15)]], Meta(max_length=16)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    mirostat: Annotated[int, Meta(ge=0, le=2)] | None = None
    mirostat_tau: Amount | None = None
    mirostat_eta: Amount | None = None
    dynatemp_range: Annotated[float, Meta(ge=-5, le=5)] | None = None
    dynatemp_exponent: Number | None = None
    smoothing_factor: Amount | None = None
    smoothing_curve: Number | None = None
    xtc_probability: Share | None = None
    xtc_threshold: Share | None = None
    dry_multiplier: Amount | None = None
    dry_base: Amount | None = None
    dry_allowed_length: Count | None = None
    dry_penalty_last_n: Annotated[int, Meta(ge=-1, le=1_048_576)] | None = None
    dry_sequence_breakers: Texts | None = None
    adaptive_target: Number | None = None
    adaptive_decay: Share | None = None
    guidance_scale: Number | None = None
    negative_prompt: str | None = None
    grammar: str | None = None
    grammar_retain_state: bool | None = None
    banned_tokens: Texts | None = None
    logit_bias: Annotated[dict[str, Number], Meta(max_length=1024)] | None = None
    ban_eos_token: bool | None = None
    bypass_eos: bool | None = None
    render_special: bool | None = None
    trim_stop: bool | None = None
    replace_instruct_placeholders: bool | None = None
    singleline: bool | None = None
    reasoning_effort: Annotated[str, Meta(max_length=16)] | None = None
    thinking_budget_tokens: Annotated[int, Meta(ge=-1, le=1_048_576)] | None = None


class GenerateFields(Samplers, kw_only=True):
    """`POST /api/v1/generate` and `POST /api/extra/generate/stream`.

    `max_context_length` is checked and no more: a prompt is never cut here, so the model's own context is what counts.
    From `use_default_badwordsids` to `custom_token_bans`: other ways to ask for what a sampler does.
    """

    prompt: str
    memory: str | None = None
    max_length: int | None = None
    max_context_length: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=5)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Share | None = None
    sampler_seed: Annotated[int, Meta(ge=-1, le=LARGEST_SEED)] | None = None
    stop_sequence: str | Texts | None = None
    genkey: Annotated[str, Meta(max_length=128)] | None = None
    n: int | None = None
    use_default_badwordsids: bool | None = None
    repetition_penalty: Repetition | None = None
    repeat_penalty: Repetition | None = None
    banned_strings: Texts | None = None
    custom_token_bans: str | None = None

    logprobs: bool | int | None = None
    images: Raw | UnsetType = UNSET
    audio: Raw | UnsetType = UNSET


class TavernFields(GenerateFields, kw_only=True):
    """`POST /v1/completions` as SillyTavern sends it to a KoboldCPP: every field by the names of five servers."""

    api_type: Raw | UnsetType = UNSET
    max_tokens: int | None = None
    seed: Annotated[int, Meta(ge=-1, le=LARGEST_SEED)] | None = None
    stop: str | Texts | None = None
    stream: bool | None = None


class KeyFields(Struct):
    """`POST /api/extra/generate/check` and `POST /api/extra/abort`, where there is a body."""

    genkey: Annotated[str, Meta(max_length=128)] | None = None


class CountFields(Struct):
    """`POST /api/extra/tokencount`."""

    prompt: str
