"""How long the costliest bodies of 1 MiB hold the reactor; the aim is under 50 ms. `python ops/bench/parse_event.py`"""

import gc
import time

from ai_ticket.errors import DomainError
from ai_ticket.event import EventLimits, parse_event

SIZE = 1_048_576
LIMITS = EventLimits(max_tokens=4096, default_max_tokens=512)

# name: what comes before, what is repeated, what comes after
BODIES = {
    "unknown field: [],": (b'{"content":"x","u":[', b"[],", b"1]}"),
    'unknown field: "[",': (b'{"content":"x","u":[', b'["["],', b"1]}"),
    "unknown field: nested": (b'{"content":"x","u":', b"[", b"}"),
    "unknown field: lone surrogates": (b'{"content":"x","u":"', rb"\ud800", b'x"}'),
    "content: strings": (b'{"content":[', b'"",', b'"x"]}'),
    "content: empty objects": (b'{"content":[', b"{},", b'"x"]}'),
    "content: prompts": (b'{"content":[', b'{"prompt":""},', b'"x"]}'),
    "content: prompts and strings": (b'{"content":[', b'"",{"prompt":""},', b'"x"]}'),
    "content: messages as items": (b'{"content":[', b'{"role":"user","content":""},', b'"x"]}'),
    "content: messages": (
        b'{"content":{"messages":[',
        b'{"role":"user","content":""},',
        b'{"role":"user","content":"x"}]}}',
    ),
    "content: messages of no parts": (
        b'{"content":{"messages":[',
        b'{"role":"user","content":[]},',
        b'{"role":"user","content":"x"}]}}',
    ),
    "content: text with escapes": (b'{"content":"', rb"\n", b'x"}'),
    "content: text with surrogate pairs": (b'{"content":"', rb"\ud83d\ude00", b'x"}'),
    "content: JSON of strings": (b'{"content":"[', rb"\"\",", rb'\"x\"]"}'),
    "content: JSON of empty objects": (b'{"content":"[', rb"{},", rb'\"x\"]"}'),
    "content: JSON of messages": (b'{"content":"[', rb"{\"role\":\"user\",\"content\":\"\"},", rb'\"x\"]"}'),
    "metadata": (b'{"content":"x","metadata":{', b'"a":"",', b'"b":""}}'),
    "parameters: one key": (b'{"content":"x","parameters":{', b'"top_k":1,', b'"top_k":1}}'),
    "parameters: stop": (b'{"content":"x","parameters":{"stop":[', b'"a",', b'"b"]}}'),
    "plain text": (b'{"content":"', b"hello wor ", b'"}'),
}


def main() -> None:
    """Print the least of five measurements for each body, in milliseconds of CPU."""
    for name, (before, unit, after) in BODIES.items():
        body = before + unit * ((SIZE - len(before) - len(after)) // len(unit)) + after
        times = []
        for _ in range(5):
            gc.collect()
            begun = time.process_time()
            try:
                parse_event(body, LIMITS)
                outcome = "event"
            except DomainError as error:
                outcome = error.code
            times.append(time.process_time() - begun)
        print(f"{name:36} {min(times) * 1000:6.1f} ms   worst {max(times) * 1000:6.1f} ms   {outcome}")


if __name__ == "__main__":
    main()
