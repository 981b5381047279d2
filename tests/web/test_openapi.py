"""The description of the surface: complete, well formed, and true of the real daemon."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml
from daemon import ROOT, TOKEN, Daemon
from surface import Surface

from ai_ticket.event import EventLimits
from ai_ticket.web.openapi import document

DOCUMENT = document(EventLimits(4096, 512), 1000)
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
)
"""Not `positive_data_acceptance`, for a schema can't say all that a request must be."""


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == "$ref":
                yield inner
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_every_route_and_no_other(surface: Surface) -> None:
    found = {path: {method.upper() for method in operations} for path, operations in DOCUMENT["paths"].items()}
    assert found == {route.path: set(route.handlers) for route in surface.routes}


def test_all_that_it_refers_to_is_there_and_nothing_else() -> None:
    defined = {f"#/components/schemas/{name}" for name in DOCUMENT["components"]["schemas"]}
    assert set(references(DOCUMENT)) == defined


def test_the_limits_in_force() -> None:
    schemas = document(EventLimits(77, 5), 33)["components"]["schemas"]
    assert schemas["GenerateFields"]["properties"]["max_length"]["anyOf"][0]["maximum"] == 77
    assert schemas["ChatFields"]["properties"]["max_tokens"]["anyOf"][0]["maximum"] == 77
    body = document(EventLimits(77, 5), 33)["paths"]["/events"]["post"]["requestBody"]["content"]
    assert body["application/json"]["schema"]["maxItems"] == 33


def test_the_file_is_what_is_generated() -> None:
    """`openapi.yaml` at the root; CONTRIBUTING says what writes it anew."""
    written = subprocess.run([sys.executable, "-m", "ai_ticket.web.openapi"], check=True, capture_output=True, cwd=ROOT)
    assert (ROOT / "openapi.yaml").read_bytes() == written.stdout
    assert yaml.safe_load(written.stdout) == DOCUMENT


def test_what_is_always_refused_is_not_among_what_may_be_sent() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    for schema, name, good, bad in (("TextFields", "suffix", "", "a"), ("GenerateFields", "logprobs", False, True)):
        field = jsonschema_rs.validator_for(schemas[schema]["properties"][name])
        assert field.is_valid(None)
        assert field.is_valid(good)
        assert not field.is_valid(bad)


def test_anyone_may_read_it(surface: Surface) -> None:
    [(status, headers, body)] = surface.http1(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(body) == document(EventLimits(4096, 512), 20)


@pytest.mark.e2e
def test_it_is_true(tmp_path: Path) -> None:
    """What schemathesis makes of it, right and wrong, is answered as it says. The model server is a fake one."""
    fake = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "fake_process.py"), "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert fake.stdout is not None
        url = f"http://127.0.0.1:{fake.stdout.readline().split()[-1]}"
        daemon = Daemon(
            tmp_path,
            KOBOLDCPP_API_URL=url,
            KOBOLDCPP_SLOTS="4",
            DEFAULT_MAX_TOKENS="8",
            MAX_TOKENS_LIMIT="16",
            OTEL_TRACES_EXPORTER="none",
        )
        try:
            daemon.ready()
            checked = subprocess.run(
                [
                    Path(sys.executable).parent / "schemathesis",
                    "run",
                    f"http://127.0.0.1:{daemon.port('http')}/openapi.json",
                    f"--header=Authorization: Bearer {TOKEN}",
                    f"--checks={','.join(CHECKS)}",
                    "--phases=coverage,fuzzing",
                    "--max-examples=10",
                    "--max-time=20",
                    "--suppress-health-check=all",
                    "--warnings=off",
                    "--no-color",
                ],
                check=False,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=120,
            )
        finally:
            daemon.close()
        assert checked.returncode == 0, checked.stdout[-10_000:] + checked.stderr[-2000:]
    finally:
        fake.kill()
        fake.communicate()
