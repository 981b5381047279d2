"""The results: a table to read, JSON to compare, a chart to show. Nothing in them tells which machine it was."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from math import isnan
from pathlib import Path
from typing import Any

from figures import Column, Figures, Round, number, summary, table

ANSWERS: Sequence[Column] = (
    ("requests/s", lambda f: number(f.rate, 0)),
    ("CPU ms", lambda f: number(f.cpu * 1e3, 3)),
    ("x aiohttp", lambda f: number(f.times_cpu)),
    ("rate x", lambda f: number(f.times_rate)),
    ("+p50 ms", lambda f: number(f.p50 * 1e3)),
    ("+p99 ms", lambda f: number(f.p99 * 1e3)),
    ("RSS MB", lambda f: number(f.resident / 1e6, 0)),
    ("errors", lambda f: str(f.errors)),
)
STREAMS: Sequence[Column] = (
    ("tokens/s", lambda f: number(f.rate, 0)),
    ("CPU us/token", lambda f: number(f.cpu * 1e6, 1)),
    ("x aiohttp", lambda f: number(f.times_cpu)),
    ("+first p50 ms", lambda f: number(f.p50 * 1e3)),
    ("+first p99 ms", lambda f: number(f.p99 * 1e3)),
    ("jitter p99 ms", lambda f: number(f.jitter * 1e3, 1)),
    ("KB/stream", lambda f: number(f.each / 1e3, 0)),
    ("RSS MB", lambda f: number(f.resident / 1e6, 0)),
    ("errors", lambda f: str(f.errors)),
)

Results = dict[str, list[Round]]
"""Rounds by the row's name."""

Cases = dict[str, tuple[str, Results, list[tuple[str, Figures]]]]
"""By the case's name its title, what was measured, and what that comes to."""


def summaries(results: Results, base: str, direct: str) -> list[tuple[str, Figures]]:
    """The figures of each row, against the base's and the model server's own, where they were measured."""
    found = []
    for name, rounds in results.items():
        unknown = [Round()] * len(rounds)
        found.append((name, summary(rounds, results.get(base) or unknown, results.get(direct) or unknown)))
    return found


def as_table(title: str, streams: bool, rows: Sequence[tuple[str, Figures]]) -> str:
    """A case's table under its title."""
    return f"{title}\n{table(rows, STREAMS if streams else ANSWERS)}\n"


def as_json(about: dict[str, Any], cases: Cases) -> str:
    """All of it: what was run, and of each case and row the figures and the rounds that they are from."""
    found = {}
    for name, (title, results, rows) in cases.items():
        figures = {
            row: {
                **{key: None if isnan(value) else round(value, 9) for key, value in asdict(one).items()},
                "rounds": [each.plain() for each in results[row]],
            }
            for row, one in rows
        }
        found[name] = {"title": title, "rows": figures}
    return json.dumps({**about, "cases": found}, indent=1) + "\n"


BAR, GAP, LEFT, WIDTH = 16, 4, 230, 420
COLOURS = {"AI Ticket": "#0b7285", "aiohttp": "#868e96"}


def as_svg(subtitle: str, cases: Sequence[tuple[str, bool, Sequence[tuple[str, Figures]]]], leave_out: str) -> str:
    """Bars of CPU for each request or token, a panel for each case; shorter is better."""
    parts, top = [], 56
    for title, streams, rows in cases:
        shown = [(name, one) for name, one in rows if name != leave_out and not isnan(one.cpu)]
        if not shown:
            continue
        scale, unit = (1e6, "us a token") if streams else (1e3, "ms a request")
        most = max(one.cpu for _, one in shown)
        parts.append(f'<text x="12" y="{top}" class="h">{escape(title)}: CPU, {unit}</text>')
        top += 10
        for name, one in shown:
            length = max(1.0, one.cpu / most * WIDTH)
            colour = next((found for key, found in COLOURS.items() if name.startswith(key)), "#ced4da")
            label = f"{number(one.cpu * scale, 1 if streams else 2)}  ({number(one.times_cpu)} x)"
            parts.append(f'<text x="{LEFT - 8}" y="{top + 12}" text-anchor="end">{escape(name)}</text>')
            parts.append(f'<rect x="{LEFT}" y="{top}" width="{length:.1f}" height="{BAR}" fill="{colour}"/>')
            parts.append(f'<text x="{LEFT + length + 6:.1f}" y="{top + 12}">{label}</text>')
            top += BAR + GAP
        top += 26
    style = "text{font:12px sans-serif;fill:#212529}.h{font-weight:bold}.t{font-size:16px;font-weight:bold}"
    width = LEFT + WIDTH + 130
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top}" viewBox="0 0 {width} {top}">'
    title_line = '<text x="12" y="22" class="t">CPU of AI Ticket and its peers (x: against bare aiohttp)</text>'
    under = f'<text x="12" y="38">{escape(subtitle)}</text>'
    background = f'<rect width="{width}" height="{top}" fill="#fff"/>'
    return "\n".join([head, f"<style>{style}</style>", background, title_line, under, *parts, "</svg>"]) + "\n"


def save(folder: Path, name: str, content: str) -> Path:
    """Write a file of the results."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path
