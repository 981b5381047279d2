"""What Prometheus gets of the service, and what queries ask of it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from daemon import ROOT, Certificates
from memory_tracer import FakeReactor
from prometheus_client import CollectorRegistry, generate_latest

from ai_ticket import tap
from ai_ticket.environment import load

PROMETHEUS = ROOT / "ops/prometheus"
TARGET = {"job", "instance"}
"""Labels that Prometheus adds to all it scrapes."""

OF_PROMETHEUS = {"up": TARGET, "ALERTS": {*TARGET, "alertname", "alertstate", "severity"}}
_SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}


@dataclass
class Exposed:
    """The series that a service exposes: labels by name, and the values that a label has from the start."""

    text: bytes
    labels: dict[str, set[str]] = field(default_factory=dict)
    values: dict[tuple[str, str], set[str]] = field(default_factory=dict)


class _Registry(CollectorRegistry):
    """Remembers what is registered: the text does not tell the labels of a family that has no series yet."""

    def __init__(self) -> None:
        super().__init__()
        self.registered: list[Any] = []

    def register(self, collector: Any) -> None:
        self.registered.append(collector)
        super().register(collector)


def exposed(folder: Path, **settings: str) -> Exposed:
    """What the whole service, with two backends and these settings, registers."""
    certificates = Certificates(folder)
    (folder / ".env").touch()
    registry = _Registry()
    environ = {
        "AI_TICKET_ENV_FILE": str(folder / ".env"),
        "AI_TICKET_AUTH": "off",
        "KOBOLDCPP_API_URL": "http://a:1,http://b:2",
        "OTEL_TRACES_EXPORTER": "none",
        "TLS_CERT_FILE": str(certificates.certificate),
        "TLS_KEY_FILE": str(certificates.key),
        **settings,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tap, "CollectorRegistry", lambda: registry)
        tap.build(load(environ), FakeReactor())
    found = Exposed(generate_latest(registry))
    for collector in registry.registered:
        labels = {*TARGET, *getattr(collector, "_labelnames", ())}
        for family in collector.collect():
            for suffix in _SUFFIXES[family.type]:
                found.labels[family.name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    for family in registry.collect():
        for sample in family.samples:
            for name, value in sample.labels.items():
                found.values.setdefault((sample.name, name), set()).add(value)
    return found


def rules(file: str) -> list[dict[str, Any]]:
    """The rules of a file, of all its groups."""
    groups = yaml.safe_load((PROMETHEUS / file).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def recorded() -> dict[str, set[str]]:
    """The labels that may be asked of each recorded name."""
    found: dict[str, set[str]] = {}
    for rule in rules("recording.yml"):
        found.setdefault(rule["record"], {"job"}).update(rule.get("labels", {}))
    for name, labels in found.items():
        if name.startswith("ai_ticket:failure_ratio:"):
            labels.add("sli")  # from what it is computed of
    return found


def problems(query: str, known: Exposed) -> Iterator[str]:
    """What a query asks for that there is not.

    @raise ValueError: it can't be parsed.
    """
    names = known.labels | recorded() | OF_PROMETHEUS
    nodes: list[Any] = []
    promql_parser.walk(promql_parser.parse(query), nodes.append)
    selectors = [node for node in nodes if isinstance(node, promql_parser.VectorSelector)]
    there: set[str] = set()
    for selector in selectors:
        if selector.name not in names:
            yield f"no metric {selector.name}"
            continue
        there |= names[selector.name]
        for matcher in selector.matchers.matchers:
            if matcher.name not in names[selector.name]:
                yield f"{selector.name} has no label {matcher.name}"
            values = known.values.get((selector.name, matcher.name))
            for part in matcher.value.split("|") if values and matcher.name not in TARGET else []:
                if not any(re.fullmatch(part, value) for value in values or ()):
                    yield f"{selector.name} has no {matcher.name} {part}"
    for node in nodes:
        labels = getattr(getattr(node, "modifier", None), "labels", None) or ()
        yield from (f"nothing has the label {label}" for label in labels if label not in there)
