"""JSON texts, good and bad, and the few other texts that the service reads."""

import json
from random import Random
from typing import Any

from fuzz.mutation import mutate, text

_WORDS = [
    "",
    "x",
    "hello",
    "\u00e9\U0001f600",
    "\u0000",
    '{"prompt": "x"}',
    "[",
    "{}",
    "null",
    "\ud83d\ude00",
    "\\",
    '"',
    "a" * 300,
]
_KEYS = [
    "content", "parameters", "stream", "metadata", "messages", "prompt", "role", "max_tokens", "temperature", "top_p",
    "top_k", "min_p", "seed", "stop", "type", "text", "model", "", "\u00e9", "__proto__", "element_1",
]  # fmt: skip
_NUMBERS: list[Any] = [
    0,
    -0.0,
    1,
    -1,
    0.5,
    4096,
    4097,
    2**31,
    2**32,
    2**63,
    2**64,
    10**40,
    1e308,
    5e-324,
    True,
    False,
    None,
]


def event(random: Random) -> bytes:
    """A valid event, of the simplest kinds."""
    content = random.choice(
        ["hi", {"prompt": "hi"}, ["a", {"prompt": "b"}], {"messages": [{"role": "user", "content": "hi"}]}]
    )
    found: dict[str, Any] = {"content": content}
    if random.random() < 0.3:
        found["parameters"] = random.choice([{}, {"max_tokens": 5}, {"temperature": 0.5, "stop": ["a"]}, {"seed": 7}])
    if random.random() < 0.2:
        found["metadata"] = {"a": "b"}
    if random.random() < 0.2:
        found["unknown"] = value(random, 3)
    return json.dumps(found, ensure_ascii=random.random() < 0.5, indent=random.choice([None, 1])).encode(
        "utf-8", "ignore"
    )


def value(random: Random, depth: int) -> Any:
    """Any JSON value, with the keys and the values that mean something to us."""
    kind = random.random()
    if depth <= 0 or kind < 0.35:
        return random.choice([*_WORDS, *_NUMBERS])
    if kind < 0.6:
        return [value(random, depth - 1) for _ in range(random.randint(0, 4))]
    return {random.choice(_KEYS): value(random, depth - 1) for _ in range(random.randint(0, 5))}


def document(random: Random) -> bytes:
    """An event, or what could be taken for one; often damaged."""
    kind = random.random()
    if kind < 0.1:
        data = event(random)
    elif kind < 0.7:
        found = value(random, 5)
        if isinstance(found, dict):
            found.setdefault("content", value(random, 4))
        data = json.dumps(found, ensure_ascii=random.random() < 0.8).encode("utf-8", "surrogatepass")
    elif kind < 0.8:
        opener = random.choice([b"[", b'{"content":', b'{"a":', b"[[[{}],"])
        data = opener * random.choice([10, 60, 600, 1100, 5000]) + b'"x"'
        if random.random() < 0.5:
            data = b'{"content":"x","u":' + data + b"}"
    else:
        data = b'{"content":' + text(random, 20) + b"}"
    return mutate(random, data) if random.random() < 0.5 else data


def batch(random: Random) -> bytes:
    """Many of them, as an array or as lines."""
    documents = [document(random) if random.random() < 0.3 else event(random) for _ in range(random.randint(0, 8))]
    kind = random.random()
    data = (
        b"[" + b",".join(documents) + b"]"
        if kind < 0.5
        else random.choice([b"\n", b"\r\n", b"\n\n \n"]).join(documents)
    )
    return mutate(random, data) if random.random() < 0.3 else data
