"""What callers of the other surfaces ask of a model server: raw prompts, further fields, tools, chunks."""

import json
from typing import Any

import pytest
from harness import Answer, capture, recorded
from test_kobold import CHAT, KOBOLD, LLAMA, NATIVE, TEXT, WHOLE, World
from twisted.internet.interfaces import IPushProducer

from ai_ticket.content import Function, ToolCall
from ai_ticket.event import Chunks, Completion, Event, Message, Parameters, Usage

HEAD = b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
CHUNKS = Chunks("chatcmpl-ours", 1700000000)
USAGE = Chunks("chatcmpl-ours", 1700000000, usage=True)
HELLO = [Message("user", "hello")]
TOOLS = {"tools": '[{"type":"function","function":{"name":"f"}}]'}
PROPS = b'HTTP/1.0 200 OK\r\n\r\n{"total_slots": 1, "default_generation_settings": {"n_ctx": 2048}%s}'
TOOLED = {"GET /props": Answer([PROPS % b', "chat_template_caps": {"supports_tools": true}'])}
UNITED = {"GET /api/v1/model": recorded("koboldcpp/get-api_v1_model.txt")}


class Chunked:
    """A sink that keeps what comes."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, text: str) -> None:
        raise AssertionError("no text was asked for")

    def relay(self, chunks: bytes) -> None:
        self.data += chunks

    def attach(self, producer: IPushProducer) -> None:
        pass

    @property
    def chunks(self) -> list[dict[str, Any]]:
        *blocks, rest = self.data.decode().split("\n\n")
        assert rest == ""
        return [json.loads(block.removeprefix("data: ")) for block in blocks]

    @property
    def text(self) -> str:
        choices = [choice for chunk in self.chunks for choice in chunk["choices"]]
        return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


def chat(chunks: Chunks | None = None, **extra: str) -> Event:
    return Event(HELLO, Parameters(max_tokens=60), extra=extra, chunks=chunks)


def raw(chunks: Chunks | None = None, **extra: str) -> Event:
    return Event([], Parameters(max_tokens=60, seed=7), raw_prompt="Once", extra=extra, chunks=chunks)


def stream(*events: Any) -> Answer:
    data = "".join(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events)
    return Answer([HEAD + data.encode()])


def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-theirs",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "/models/m.gguf",
        "choices": [{"index": 0, "delta": delta, "finish_reason": reason}],
        **more,
    }


def probed(answers: dict[str, Answer]) -> World:
    world = World(answers)
    world.probe()
    return world


def relayed(world: World, event: Event) -> tuple[Chunked, Completion]:
    sink = Chunked()
    completion = world.result(world.begin(event, sink=sink))
    return sink, completion


def test_a_raw_prompt_is_never_put_into_a_template() -> None:
    world = probed(
        {
            **KOBOLD,
            CHAT: recorded("koboldcpp/chat-stream.txt"),
            TEXT: recorded("koboldcpp/completions-stream-usage.txt"),
        }
    )
    assert world.complete(raw()).text == ", the company had"
    assert world.posts() == [TEXT]
    assert world.sent(TEXT)["prompt"] == "Once"


def test_what_lacks_one_endpoint_keeps_the_others() -> None:
    """That a server has no /v1/completions does not keep chats from its chat endpoint."""
    world = probed(
        {**KOBOLD, CHAT: recorded("koboldcpp/chat-stream.txt"), NATIVE: recorded("koboldcpp/generate-stream.txt")}
    )
    world.complete(raw())
    world.complete(chat())
    world.complete(raw())
    assert world.posts() == [TEXT, NATIVE, CHAT, NATIVE]


def test_further_fields_are_passed_on_as_given() -> None:
    world = probed({**LLAMA, CHAT: recorded("llamacpp/chat-stream-usage.txt")})
    world.complete(chat(presence_penalty="0.5", response_format='{"type": "json_object"}', rep_pen="1.1"))
    sent = world.sent(CHAT)
    assert (sent["presence_penalty"], sent["response_format"]) == (0.5, {"type": "json_object"})
    assert sent["repeat_penalty"] == 1.1  # llama.cpp's name for it
    assert "rep_pen" not in sent


def test_native_endpoints_have_names_of_their_own() -> None:
    world = probed({**UNITED, NATIVE: recorded("koboldcpp/generate-stream.txt")})
    world.complete(raw(repeat_penalty="1.2", frequency_penalty="0.3", logit_bias='{"5": -100}', rep_pen_slope="1"))
    sent = world.sent(NATIVE)
    assert sent["rep_pen"] == 1.2
    assert sent["presence_penalty"] == 0.3
    assert (sent["max_length"], sent["sampler_seed"]) == (60, 7)
    assert (sent["logit_bias"], sent["rep_pen_slope"]) == ({"5": -100}, 1)


def test_of_two_penalties_the_one_that_says_something() -> None:
    """KoboldCPP has but one, and looks at `frequency_penalty` only where the other is not there."""
    world = probed({**KOBOLD, CHAT: recorded("koboldcpp/chat-stream.txt")})
    world.complete(chat(presence_penalty="0", frequency_penalty="0.5"))
    assert "presence_penalty" not in world.sent(CHAT)
    assert world.sent(CHAT)["frequency_penalty"] == 0.5
    both = world.begin(chat(presence_penalty="0.2", frequency_penalty="0.5"))
    assert world.fault_of(both) == ("unsupported_parameter", "frequency_penalty")


@pytest.mark.parametrize(
    ("event", "name"),
    [
        (chat(**TOOLS), "tools"),
        (chat(response_format='{"type":"json_object"}'), "response_format"),
        (chat(logprobs="true"), "logprobs"),
        (Event([Message("system", "x")], Parameters(max_tokens=5)), "messages"),
        (Event([*HELLO, Message("tool", "9", tool_call_id="1")], Parameters(max_tokens=5)), "messages"),
    ],
)
def test_what_a_server_without_a_chat_endpoint_can_not_do_is_refused(event: Event, name: str) -> None:
    world = probed({**UNITED, NATIVE: recorded("koboldcpp/generate-stream.txt")})
    assert world.fault_of(world.begin(event)) == ("unsupported_parameter", name)
    assert world.posts() == []
    assert list(world.attempts) == []


def test_also_where_it_shows_late() -> None:
    world = probed({**KOBOLD, TEXT: recorded("koboldcpp/completions-stream-usage.txt")})
    assert world.fault_of(world.begin(chat(**TOOLS))) == ("unsupported_parameter", "tools")
    assert world.complete(chat()).text == ", the company had"


def test_tools_that_the_model_has_no_words_for() -> None:
    """llama.cpp would leave them out without a word: so it was with the model that was recorded."""
    world = probed({**LLAMA, CHAT: recorded("llamacpp/chat-stream-usage.txt")})
    assert world.backend.state.tools is False
    assert world.fault_of(world.begin(chat(**TOOLS))) == ("unsupported_parameter", "tools")
    silent = probed({"GET /props": Answer([PROPS % b""]), CHAT: stream(*CALLS)})
    assert silent.backend.state.tools is None
    assert silent.complete(chat(**TOOLS)).tool_calls


CALLS = (
    chunk({"role": "assistant", "content": None}),
    chunk({"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}]}),
    chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]}),
    chunk({"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]}),
    chunk({"tool_calls": [{"index": 1, "id": "c2", "function": {"name": "g", "arguments": "{}"}}]}),
    chunk({}, "tool_calls"),
    "[DONE]",
)


def test_calls_of_tools_are_put_together() -> None:
    world = probed({**TOOLED, CHAT: stream(*CALLS)})
    messages = [*HELLO, Message("assistant", "", tool_calls=[ToolCall("c0", Function("f", "{}"))])]
    event = Event([*messages, Message("tool", "9", tool_call_id="c0")], Parameters(max_tokens=60), extra=TOOLS)
    completion = world.complete(event)
    assert completion.tool_calls == [ToolCall("c1", Function("f", '{"a": 1}')), ToolCall("c2", Function("g", "{}"))]
    assert (completion.finish_reason, completion.text) == ("tool_calls", "")
    sent = world.sent(CHAT)
    assert sent["tools"] == [{"type": "function", "function": {"name": "f"}}]
    assert sent["messages"][1:] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c0", "function": {"name": "f", "arguments": "{}"}, "type": "function"}],
        },
        {"role": "tool", "content": "9", "tool_call_id": "c0"},
    ]


def test_calls_without_an_index_or_a_right_reason() -> None:
    """As KoboldCPP sends them: in one piece, and the answer has "stop"ped or not."""
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
        {"function": {"name": "g"}},
    ]
    world = probed({**KOBOLD, CHAT: stream(chunk({"tool_calls": calls}), chunk({}, "stop"), "[DONE]")})
    completion = world.complete(chat(**TOOLS))
    assert completion.tool_calls == [ToolCall("c1", Function("f", "{}")), ToolCall("call_1", Function("g", ""))]
    assert completion.finish_reason == "tool_calls"


def test_what_the_model_thinks_is_life_and_no_text() -> None:
    world = probed(
        {
            **LLAMA,
            CHAT: stream(chunk({"reasoning_content": "Hm."}), chunk({"content": "4"}), chunk({}, "stop"), "[DONE]"),
        }
    )
    completion = world.complete(chat())
    assert (completion.text, completion.reasoning) == ("4", "Hm.")


def test_logprobs() -> None:
    said = {"index": 0, "finish_reason": None, "delta": {"content": "4"}}
    first, second = ({**said, "logprobs": {"content": [{"token": token}]}} for token in ("a", "b"))
    world = probed({**LLAMA, CHAT: stream({"choices": [first]}, {"choices": [second]}, chunk({}, "stop"), "[DONE]")})
    completion = world.complete(chat(logprobs="true"))
    assert json.loads(completion.logprobs or "") == [{"token": "a"}, {"token": "b"}]


def test_logprobs_of_a_text_are_refused() -> None:
    """No surface has a place for them in its answers."""
    world = probed({**LLAMA, TEXT: stream({"choices": [{"text": "x", "finish_reason": "stop"}]}, "[DONE]")})
    assert world.fault_of(world.begin(raw(logprobs="true"))) == ("unsupported_parameter", "logprobs")


@pytest.mark.parametrize("name", ["koboldcpp/chat-stream-usage.txt", "llamacpp/chat-stream-usage.txt"])
def test_chunks_go_on_as_they_were_framed(name: str) -> None:
    """But for their id and model, not a byte is another; neither the counts nor [DONE] are among them."""
    world = probed({**(KOBOLD if "kobold" in name else LLAMA), CHAT: recorded(name)})
    world.server.answers["GET /api/extra/perf"] = Answer([])
    sink, completion = relayed(world, Event(HELLO, Parameters(max_tokens=4), chunks=CHUNKS))
    body = capture(name)[1].partition(b"\r\n\r\n")[2]
    theirs = [block for block in body.split(b"\n\n") if b'"choices": []' not in block and b'"choices":[]' not in block]
    chunks = [block.partition(b"data: ")[2] for block in theirs if b"data: {" in block]
    ours = [block.removeprefix(b"data: ") for block in sink.data.split(b"\n\n")[:-1]]
    assert len(ours) == len(chunks) > 1
    for mine, his in zip(ours, chunks, strict=True):
        old = json.loads(his)
        renamed = his.replace(old["id"].encode(), b"chatcmpl-ours").replace(
            old["model"].encode(), completion.model.encode()
        )
        assert mine == renamed
    assert completion.text == ""
    assert {chunk["model"] for chunk in sink.chunks} == {completion.model}
    assert "/" not in completion.model.removeprefix("koboldcpp/")


def test_counts_where_they_are_asked_for() -> None:
    world = probed({**LLAMA, CHAT: recorded("llamacpp/chat-stream-usage.txt")})
    sink, _ = relayed(world, chat(USAGE))
    last = sink.chunks[-1]
    assert (last["choices"], last["usage"]["total_tokens"], last["id"]) == ([], 41, "chatcmpl-ours")
    assert "timings" in last  # what else the server says of it is there too


def test_wrong_counts_are_made_up_for() -> None:
    """KoboldCPP up to 1.77 always says 100; what it really was it tells elsewhere."""
    world = probed(
        {
            **KOBOLD,
            CHAT: stream(
                chunk({"content": "Hi"}),
                chunk({}, "length"),
                {"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 100, "total_tokens": 200}},
                "[DONE]",
            ),
            "GET /api/extra/perf": Answer(
                [b"HTTP/1.0 200 OK\r\n\r\n" + b'{"last_token_count": 2, "last_input_count": 3, "stop_reason": 2}']
            ),
        }
    )
    sink, completion = relayed(world, chat(USAGE))
    assert completion.usage == Usage(3, 2, 5)
    assert sink.chunks[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def test_why_it_ended_is_put_right() -> None:
    """KoboldCPP says "length" where a stop sequence ended it; the chunk that says so waits until that is known."""
    world = probed({**KOBOLD, CHAT: recorded("koboldcpp/chat-stream-usage.txt")})
    sink, completion = relayed(world, Event(HELLO, Parameters(max_tokens=60), chunks=CHUNKS))
    assert completion.finish_reason == "stop"
    assert sink.chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_nothing_before_some_of_the_answer_has_come() -> None:
    """So another attempt can be made when it breaks after the chunk with the role."""
    world = probed({**LLAMA, CHAT: stream(chunk({"role": "assistant", "content": None}))})
    sink = Chunked()
    code, _ = world.fault_of(world.begin(chat(CHUNKS), sink=sink))
    assert code == "api_response_structure_error"
    assert sink.data == b""


def test_an_answer_of_nothing() -> None:
    world = probed({**LLAMA, CHAT: stream(chunk({"role": "assistant", "content": None}), chunk({}, "stop"), "[DONE]")})
    sink, _ = relayed(world, chat(CHUNKS))
    assert [one["choices"][0]["finish_reason"] for one in sink.chunks] == [None, "stop"]


def test_calls_of_tools_in_chunks() -> None:
    world = probed({**TOOLED, CHAT: stream(*CALLS)})
    sink, completion = relayed(world, Event(HELLO, Parameters(max_tokens=60), extra=TOOLS, chunks=CHUNKS))
    assert [one["choices"] for one in sink.chunks] == [one["choices"] for one in CALLS[:-1]]  # type: ignore[index]
    assert (completion.finish_reason, completion.tool_calls) == ("tool_calls", None)


@pytest.mark.parametrize(
    "odd",
    [
        {"choices": [{"delta": {"content": "Hi"}}]},
        {"id": "a\u00e9", "model": "m", "choices": [{"delta": {"content": "Hi"}}]},
        {"id": "m", "model": "m", "choices": [{"delta": {"content": "Hi", "model": "m"}}]},
        {"id": 7, "model": "m", "choices": [{"delta": {"content": "Hi"}}]},
    ],
)
def test_uncommon_frames(odd: dict[str, Any]) -> None:
    """Whatever a server leaves out of its chunks, or writes twice, callers get whole ones."""
    world = probed(
        {**LLAMA, CHAT: stream(odd, {**odd, "id": "other"}, {"choices": [{"finish_reason": "stop"}]}, "[DONE]")}
    )
    sink, _ = relayed(world, chat(CHUNKS))
    assert sink.text == "HiHi"
    for one in sink.chunks:
        assert (one["id"], one["object"]) == ("chatcmpl-ours", "chat.completion.chunk")
        assert isinstance(one["created"], int)
    assert {one["model"] for one in sink.chunks} <= {"m", "SmolLM2-135M-Instruct.Q4_1"}
    assert sink.chunks[0]["choices"] == odd["choices"]


def test_a_text_that_looks_like_a_frame() -> None:
    tricky = '"id": "chatcmpl-theirs", "model": "/models/m.gguf" [DONE]\n\ndata: {"id": "x"}'
    world = probed(
        {**LLAMA, CHAT: stream(chunk({"content": tricky}), chunk({"content": tricky}), chunk({}, "stop"), "[DONE]")}
    )
    sink, _ = relayed(world, chat(CHUNKS))
    assert sink.text == 2 * tricky
    assert {one["id"] for one in sink.chunks} == {"chatcmpl-ours"}


def test_an_event_of_several_lines() -> None:
    """Callers get it on one: a bare line would be none of the event's."""
    lines = [json.dumps(chunk({"content": "a\nb"}), indent=1).replace("\n", "\ndata: ") for _ in range(2)]
    world = probed({**LLAMA, CHAT: stream(*lines, chunk({}, "stop"), "[DONE]")})
    sink, _ = relayed(world, chat(CHUNKS))
    assert sink.text == 2 * "a\nb"
    assert all(line == b"" or line.startswith(b"data: ") for line in sink.data.split(b"\n"))


def test_a_call_with_the_id_of_its_frame() -> None:
    """As where a server leaves both empty."""
    call = {"index": 0, "id": "", "function": {"name": "f", "arguments": "{}"}}
    deltas: list[dict[str, Any]] = [{"content": "x"}, {"tool_calls": [call]}]
    framed = [{"choices": [], **chunk(delta), "id": ""} for delta in deltas]  # the frame's own comes last
    world = probed({**TOOLED, CHAT: stream(*framed, chunk({}, "tool_calls"), "[DONE]")})
    sink, _ = relayed(world, Event(HELLO, Parameters(max_tokens=60), extra=TOOLS, chunks=CHUNKS))
    assert {one["id"] for one in sink.chunks} == {"chatcmpl-ours"}
    assert sink.chunks[1]["choices"][0]["delta"]["tool_calls"] == [call]


def test_a_chunk_of_nothing_after_the_counts() -> None:
    counts = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    empty = {**chunk({}), "choices": []}
    said = chunk({"content": "Hi"}), chunk({}, "stop"), {**empty, "usage": counts, "timings": {}}, empty
    sink, completion = relayed(probed({**LLAMA, CHAT: stream(*said, "[DONE]")}), chat(USAGE))
    assert completion.usage == Usage(3, 4, 7)
    assert (sink.chunks[-1]["usage"], sink.chunks[-1]["timings"]) == (counts, {})


def test_of_several_answers_the_first() -> None:
    two = [{"index": index, "delta": {"content": text}} for index, text in enumerate("AB")]
    end = {"choices": [{"index": 1, "delta": {}, "finish_reason": "length"}]}
    world = probed({**LLAMA, CHAT: stream({"choices": two}, end, chunk({}, "stop"), "[DONE]")})
    completion = world.complete(chat())
    assert (completion.text, completion.finish_reason) == ("A", "stop")


@pytest.mark.parametrize(
    ("answers", "event"),
    [
        ({**UNITED, NATIVE: recorded("koboldcpp/generate-stream.txt")}, chat(USAGE)),
        ({**UNITED, NATIVE: recorded("koboldcpp/generate-stream.txt")}, raw(USAGE)),
        ({**UNITED, WHOLE: recorded("koboldcpp/generate-min.txt")}, raw(USAGE)),
        ({**KOBOLD, TEXT: recorded("koboldcpp/completions-stream-usage.txt")}, chat(USAGE)),
    ],
)
def test_chunks_are_made_where_the_server_has_others(answers: dict[str, Answer], event: Event) -> None:
    sink, completion = relayed(probed(answers), event)
    kind = "chat.completion.chunk" if event.raw_prompt is None else "text_completion"
    chunks = sink.chunks
    assert {(one["id"], one["object"], one["created"]) for one in chunks} == {("chatcmpl-ours", kind, 1700000000)}
    assert sink.text != ""
    if event.raw_prompt is None:
        assert [one["choices"][0]["delta"].get("role") for one in chunks if one["choices"]][:2] == ["assistant", None]
    ends = [one["choices"][0]["finish_reason"] for one in chunks if one["choices"]]
    assert ends[-1] == completion.finish_reason
    assert set(ends[:-1]) == {None}
    assert ("usage" in chunks[-1]) == (completion.usage is not None)


def counting(text: str) -> Answer:
    return Answer([f"HTTP/1.1 200 OK\r\ncontent-length: {len(text)}\r\n\r\n{text}".encode()])


def test_a_raw_prompt_is_counted_as_it_is() -> None:
    world = probed(
        {
            **KOBOLD,
            "POST /api/extra/tokencount": counting('{"value": 2040}'),
            TEXT: recorded("koboldcpp/completions-stream-usage.txt"),
        }
    )
    event = Event([], Parameters(max_tokens=512), max_tokens_given=False, raw_prompt="a" * 2000)
    world.complete(event)
    assert world.sent("POST /api/extra/tokencount") == {"prompt": "a" * 2000}
    assert world.sent(TEXT)["max_tokens"] == 8
    too_much = world.begin(Event([], Parameters(max_tokens=512), raw_prompt="a" * 2000))
    assert world.fault_of(too_much)[0] == "context_length_exceeded"


def test_tools_are_counted_too() -> None:
    world = probed(
        {
            **TOOLED,
            "POST /apply-template": counting('{"prompt": "p"}'),
            "POST /tokenize": counting('{"tokens": [1, 2]}'),
            CHAT: stream(*CALLS),
        }
    )
    world.complete(chat(**TOOLS))
    assert world.sent("POST /apply-template")["tools"] == json.loads(TOOLS["tools"])
    world = probed(
        {**KOBOLD, "POST /api/extra/tokencount": counting('{"value": 5}'), CHAT: stream(*CALLS)},
    )
    world.complete(chat(**TOOLS))
    counted = world.sent("POST /api/extra/tokencount")["messages"]
    assert counted == [{"role": "user", "content": "hello"}, {"role": "system", "content": TOOLS["tools"]}]
