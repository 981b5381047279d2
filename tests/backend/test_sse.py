"""Server-sent events, from any split into chunks."""

import pytest
from harness import capture
from hypothesis import given
from hypothesis import strategies as st

from ai_ticket.backend.sse import LARGEST_EVENT, EventTooLarge, SSEDecoder

RECORDED = [
    "koboldcpp/chat-stream-usage.txt",
    "koboldcpp/completions-stream-usage.txt",
    "koboldcpp/generate-stream.txt",
    "koboldcpp/stop-chat-stream.txt",
    "llamacpp/chat-stream-usage.txt",
]


def decode(*pieces: bytes) -> list[bytes]:
    decoder = SSEDecoder()
    return [data for piece in pieces for data in decoder.feed(piece)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"data: a\n\n", [b"a"]),
        (b"data:a\n\ndata:  b\n\n", [b"a", b" b"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"event: message\nid: 1\ndata: a\n\n", [b"a"]),
        (b": comment\n\nretry: 5\n\ndata: a\n\n", [b"a"]),
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
        (b"data: a\r\n\r\ndata: b\r\rdata: c\n\n", [b"a", b"b", b"c"]),
        (b"\n\n\ndata: a\n\n\n", [b"a"]),
        (b"data\n\n", [b""]),
        (b"data: cut off", []),
    ],
)
def test_decoding(text: bytes, expected: list[bytes]) -> None:
    assert decode(text) == expected
    assert decode(*(bytes([byte]) for byte in text)) == expected


def test_an_endless_event_is_refused() -> None:
    decoder = SSEDecoder()
    with pytest.raises(EventTooLarge):
        for _ in range(LARGEST_EVENT // 1000 + 2):
            decoder.feed(b"x" * 1000)


@given(name=st.sampled_from(RECORDED), data=st.data())
def test_any_split_of_a_recorded_stream_decodes_to_the_same(name: str, data: st.DataObject) -> None:
    body = capture(name)[1].partition(b"\r\n\r\n")[2]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=20)))
    pieces = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    assert decode(*pieces) == decode(body)


@given(st.binary(max_size=300))
def test_any_bytes_are_decoded(data: bytes) -> None:
    decode(data, data)
