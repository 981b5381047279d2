"""`ops/bench`: the parts that reckon, and what callers and the canned model server say to each other."""

import asyncio
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

BENCH = Path(__file__).parents[2] / "ops" / "bench"
sys.path.append(str(BENCH))

import backend  # noqa: E402
import cases  # noqa: E402
import figures  # noqa: E402
import hotspots  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import wire  # noqa: E402
from answer import Answer  # noqa: E402
from figures import Round  # noqa: E402

UNKNOWN = math.nan


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([7], 0.5, 7), ([3, 1, 2], 0.5, 2), (range(1, 101), 0.99, 99), (range(1, 101), 1.0, 100), ([1, 2], 0.0, 1)],
)
def test_percentile_is_a_value_that_was_measured(values, share, expected):
    assert figures.percentile(values, share) == expected


def test_percentile_of_nothing_is_unknown():
    assert math.isnan(figures.percentile([], 0.5))


def test_ratios_are_taken_within_a_round():
    """A machine that is twice as slow in one round changes neither ratio nor difference of the rest."""
    own, base = [2.0, 4.0, 2.2], [1.0, 2.0, 1.0]
    assert figures.ratio(own, base) == 2.0
    assert figures.difference(own, base) == pytest.approx(1.2)
    assert math.isnan(figures.ratio([1.0], [0.0]))


def test_ratio_leaves_out_rounds_that_have_no_figure():
    assert figures.ratio([UNKNOWN, 3.0], [1.0, 1.0]) == 3.0


def test_summary_takes_added_latency_and_the_first_rounds_memory():
    own = [Round(cpu=0.002, p50=0.005, each=90e3, errors={"a": 1}), Round(cpu=0.002, p50=0.006, each=5e3)]
    base, direct = [Round(cpu=0.001)] * 2, [Round(p50=0.001), Round(p50=0.002)]
    found = figures.summary(own, base, direct)
    assert (found.times_cpu, found.p50, found.each, found.errors) == (2.0, pytest.approx(0.004), 90e3, 1)


def test_a_row_without_a_base_has_no_ratio():
    rows = report.summaries({"AI Ticket": [Round(cpu=1.0)]}, "aiohttp", "model server itself")
    assert math.isnan(rows[0][1].times_cpu)


def test_table_is_aligned_and_shows_what_is_unknown():
    rows = report.summaries({"a": [Round(rate=1234.5, cpu=0.001)], "longer": [Round()]}, "a", "none")
    lines = figures.table(rows, report.ANSWERS).splitlines()
    assert lines[1].split()[:4] == ["a", "1,234", "1.000", "1.00"]
    assert lines[2].split()[:3] == ["longer", "-", "-"]
    assert len({len(line) for line in lines}) == 1


def test_json_and_chart_hold_the_figures():
    results = {"AI Ticket": [Round(rate=10.0, cpu=0.002)], "aiohttp": [Round(rate=20.0, cpu=0.001)]}
    rows = report.summaries(results, "aiohttp", "model server itself")
    found = json.loads(report.as_json({"cores": 2}, {"answers": ("One <answer>", results, rows)}))
    row = found["cases"]["answers"]["rows"]["AI Ticket"]
    assert (row["times_cpu"], row["p50"], row["rounds"][0]["rate"]) == (2.0, None, 10.0)
    chart = ElementTree.fromstring(report.as_svg("today", [("One <answer>", False, rows)], "model server itself"))
    bars = [float(bar.get("width")) for bar in chart.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert bars[0] == 2 * bars[1]


@pytest.mark.parametrize("size", [0, 1024, 65536])
def test_a_prompt_tells_the_model_server_what_to_do(size):
    order = wire.Order(200, 50, size, "cut")
    for body in (wire.event_body(order, True), wire.chat_body(order, True)):
        assert size <= len(body) < size + 400
        assert wire.find_order(body) == order


def test_a_prompt_that_was_cut_is_noticed():
    body = wire.chat_body(wire.Order(size=1024), False)
    assert wire.find_order(body.replace(b"#end", b"")) is None
    assert wire.find_order(body[:900]) is None


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"completion":"Hi you","usage":null}', "Hi you"),
        (backend.WHOLE, wire.TEXT),
        (b"".join(backend.EVENTS), wire.TEXT),
        (b'data: {"delta":"Hi","done":false}\n\ndata: {"delta":" you","done":false}\n\n'
         b'data: {"delta":"","done":true}\n\n', "Hi you"),
        (b'data: {"delta":"Hi","done":false}\n\n', None),
        (b"{}", None),
    ],
)  # fmt: skip
def test_text_of_an_answer(body, text):
    assert wire.text_of(body) == text


def test_an_error_within_a_stream_is_told_by_its_code():
    ended = b'data: {"delta":"Hi","done":false}\n\nevent: error\ndata: {"error":"deadline_exceeded","message":"x"}\n\n'
    assert wire.error_within(ended) == "deadline_exceeded"
    assert wire.error_within(backend.WHOLE) is None


def test_stamps_wrap():
    assert wire.since(5, 0xFFFFFFFB) == 10
    assert wire.since(0xFFFFFFFB, 5) == -10
    assert wire.tokens(wire.token(0xFFFFFFFB).encode() + b" x " + wire.token(5).encode()) == [0xFFFFFFFB, 5]


@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.parametrize("keep", [True, False])
def test_the_load_generator_reads_what_the_model_server_sends(step, keep):
    """However it is cut into pieces; an answer that has no other end ends with its connection."""
    data, answer, body = backend.Framing(keep).whole, Answer(), b""
    for place in range(0, len(data), step):
        assert not answer.done
        body += answer.feed(data[place : place + step])
    answer.ended()
    assert (answer.status, answer.done, wire.text_of(body)) == (200, True, wire.TEXT)


def test_an_answer_of_known_length_that_breaks_off_is_not_done():
    answer = Answer()
    assert answer.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabcd") == b"abcd"
    answer.ended()
    assert not answer.done


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self):
        super().__init__()
        self.written = b""

    def write(self, data):
        self.written += data

    def close(self):
        self.written += b"closed"


@pytest.mark.parametrize(
    ("order", "stream", "status"),
    [
        (wire.Order(), False, 200),
        (wire.Order(size=2000), True, 200),
        (wire.Order(do="fail"), True, 500),
        (wire.Order(do="busy"), True, 503),
    ],
)
def test_the_model_server_answers_each_request_of_a_connection(order, stream, status):
    """Also where they come in pieces, and the next one with the end of the one before."""
    connection = backend.Connection(backend.ABOUT["llama.cpp"], backend.Framing(True), True, {})
    transport = Wire()
    connection.connection_made(transport)
    data = wire.request(peers.CHAT, wire.chat_body(order, stream)) * 2
    for place in range(0, len(data), 1000):
        connection.data_received(data[place : place + 1000])
    assert transport.written.count(b"HTTP/1.1 %d " % status) == 2
    if status == 200:
        answer = Answer()
        assert wire.text_of(answer.feed(transport.written[: len(transport.written) // 2])) == wire.TEXT


def test_a_paced_stream_sends_its_tokens_and_ends():
    connection = backend.Connection({}, framing := backend.Framing(False), False, {})
    connection.connection_made(transport := Wire())

    async def stream():
        connection.data_received(wire.request(peers.CHAT, wire.chat_body(wire.Order(3, 1000), True)))
        while not transport.written.endswith(b"closed"):
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(stream(), 10))
    assert transport.written.startswith(framing.head)
    assert len(wire.tokens(transport.written)) == 3
    assert wire.has_ended(transport.written)


def test_every_row_of_a_peer_that_others_are_measured_against_is_in_every_case():
    for case in cases.CASES:
        assert {peers.DIRECT, peers.AI_TICKET, peers.BASE} <= set(case.rows), case.name
        assert peers.BASE in cases.quick(case).rows
    assert set(cases.QUICK) <= {case.name for case in cases.CASES}


def test_hotspots_name_no_folder_of_the_machine():
    noted = [("/home/x/.venv/lib/python3/site-packages/twisted/web/http.py", 5, "feed", 3), ("/x/y/json.py", 1, "f", 1)]
    lines = hotspots.report(noted, 0.001)
    assert "75.0%   750.0 us  twisted/web/http.py:5 feed" in lines
    assert "/home" not in lines
    assert "/x/y" not in lines


SCRIPTS = ["__main__", "hotspots", "limiter_memory", "reactor_hold", "slow_clients", "soak"]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(BENCH.parents[1])}
    command = [sys.executable, BENCH / f"{script}.py", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_all_that_help_does(script):
    done = run(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage:")
    assert "[]" not in done.stdout


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("__main__", ["--only", "nonsense"]),
        ("hotspots", ["nonsense"]),
        ("limiter_memory", ["--keys", "nonsense"]),
        ("reactor_hold", ["trailers", "nonsense"]),
        ("slow_clients", ["readers", "nonsense"]),
    ],
)
def test_names_that_there_are_not_are_refused_before_anything_runs(script, arguments):
    done = run(script, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "nonsense" in done.stderr
