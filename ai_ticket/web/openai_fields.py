"""The fields of OpenAI's requests, and what each may be (OpenAI's API reference). What is not here is refused.

`null` counts as absent. A field that may be nothing but `null` is one that OpenAI has and that can't be done here. What
is `Raw` is read by itself: it may be of any size, or is passed on as it is.
"""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from ai_ticket.content import Role
from ai_ticket.event import LARGEST_SEED, LARGEST_TOP_K

Temperature = Annotated[float, Meta(ge=0, le=5)]
"""OpenAI's go up to 2, the model servers' beyond."""

Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Seed = Annotated[int, Meta(ge=0, le=LARGEST_SEED)]
TopK = Annotated[int, Meta(ge=0, le=LARGEST_TOP_K)]
Repeat = Annotated[float, Meta(ge=0, le=10)]
Counted = Annotated[int, Meta(ge=0, le=20)]
Name = Annotated[str, Meta(min_length=1, max_length=128)]


class Part(Struct, forbid_unknown_fields=True, gc=False):
    """A part of a message's content. `cache_control`, which some clients send, changes nothing here."""

    type: str
    text: str | None = None
    cache_control: Raw | UnsetType = UNSET
    image_url: None = None
    input_audio: None = None
    file: None = None
    refusal: None = None


class CalledFunction(Struct, forbid_unknown_fields=True, gc=False):
    """What was called; `arguments` is JSON text as the model wrote it. The last: the SDK's own reading of it."""

    name: str
    arguments: str
    parsed_arguments: Raw | UnsetType = UNSET


class Call(Struct, forbid_unknown_fields=True, gc=False):
    """A call of a tool, as it was in an answer; `index` is its place in a stream."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"
    index: int | None = None


class ChatMessage(Struct, forbid_unknown_fields=True, gc=False):
    """A message. From `refusal` on: what clients hand back of an answer, and is no part of the conversation."""

    role: Role
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    annotations: Raw | UnsetType = UNSET
    parsed: Raw | UnsetType = UNSET
    audio: None = None
    function_call: None = None


class OfferedFunction(Struct, forbid_unknown_fields=True):
    """What may be called; `parameters` is a JSON schema."""

    name: Name
    description: str | None = None
    parameters: Raw | UnsetType = UNSET
    strict: bool | None = None


class Tool(Struct, forbid_unknown_fields=True):
    """A tool that is offered."""

    type: Literal["function"]
    function: OfferedFunction


class NamedFunction(Struct, forbid_unknown_fields=True):
    """One of those that are offered."""

    name: str


class Choice(Struct, forbid_unknown_fields=True):
    """A choice of the tool that is to be called."""

    type: Literal["function"]
    function: NamedFunction


class Schema(Struct, forbid_unknown_fields=True):
    """What an answer is to look like."""

    schema: Raw
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, forbid_unknown_fields=True):
    """How an answer is to be written."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None


class StreamOptions(Struct, forbid_unknown_fields=True):
    """What a stream has beside the answer. There is no obfuscation, asked for or not."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Common(Struct, forbid_unknown_fields=True, kw_only=True):
    """What chats and texts have in common. The last: KoboldCPP's and llama.cpp's own, and what changes nothing here."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    stop: Raw | UnsetType = UNSET
    seed: Seed | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Raw | UnsetType = UNSET
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    top_k: TopK | None = None
    min_p: Share | None = None
    repeat_penalty: Repeat | None = None

    user: str | None = None


class ChatFields(Common, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    response_format: Raw | UnsetType = UNSET
    tools: Raw | UnsetType = UNSET
    tool_choice: Raw | UnsetType = UNSET
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Counted | None = None
    metadata: Raw | UnsetType = UNSET

    modalities: list[Literal["text"]] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    audio: None = None
    functions: None = None
    function_call: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None


class TextFields(Common, kw_only=True):
    """`POST /v1/completions`."""

    prompt: Raw
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None

    logprobs: None = None
