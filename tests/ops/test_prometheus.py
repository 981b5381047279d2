"""ops/prometheus fits the service: every name and label in it exists, every alert is tested and explained."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from daemon import ROOT
from promql import PROMETHEUS, Exposed, exposed, problems, recorded, rules

from ai_ticket.settings import DEFAULTS

ALERTS, RECORDINGS = rules("alerts.yml"), rules("recording.yml")
TESTS = [
    case for file in sorted((PROMETHEUS / "tests").glob("*.yml")) for case in yaml.safe_load(file.read_text())["tests"]
]

promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not on the PATH (Debian: apt install prometheus)"
)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Exposed:
    return exposed(tmp_path_factory.mktemp("service"))


def run(*command: str, stdin: bytes = b"") -> None:
    done = subprocess.run(command, cwd=ROOT, input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, done.stdout.decode()


def test_the_configuration_scrapes_the_exporter_and_reads_all_rules() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    [scrape] = config["scrape_configs"]
    assert scrape["job_name"] == "ai-ticket"
    assert scrape["static_configs"] == [{"targets": [f"localhost:{DEFAULTS.otel_prometheus_port}"]}]
    with_rules = [file.name for file in PROMETHEUS.glob("*.yml") if "groups" in yaml.safe_load(file.read_text())]
    assert sorted(config["rule_files"]) == sorted(with_rules) == ["alerts.yml", "recording.yml"]


@pytest.mark.parametrize("rule", RECORDINGS + ALERTS, ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_asks_for_what_there_is(rule: dict[str, Any], known: Exposed) -> None:
    assert list(problems(rule["expr"], known)) == []


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("rate(ai_ticket_server_requests[5m])", "no metric ai_ticket_server_requests"),
        ('ai_ticket_kobold_backend_up{error="x"}', "ai_ticket_kobold_backend_up has no label error"),
        ('ai_ticket_pipeline_events_total{outcome=~"ok|fine"}', "ai_ticket_pipeline_events_total has no outcome fine"),
        ("sum by (route) (ai_ticket_pipeline_queue_depth)", "nothing has the label route"),
        ("ai_ticket:nothing:rate5m", "no metric ai_ticket:nothing:rate5m"),
    ],
)
def test_what_there_is_not_is_noticed(query: str, problem: str, known: Exposed) -> None:
    assert list(problems(query, known)) == [problem]


def test_what_is_recorded_is_used() -> None:
    dashboard = (ROOT / "ops/grafana/ai-ticket.json").read_text()
    everything = dashboard + "".join(rule["expr"] for rule in ALERTS + RECORDINGS)
    for name in recorded():
        assert re.search(rf"{name}\b", everything), name


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: f"{alert['alert']}-{alert['labels']['severity']}")
def test_an_alert_says_how_bad_it_is_what_it_is_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert all(alert["annotations"].values())
    file, anchor = alert["annotations"]["runbook_url"].split("#")
    assert anchor == alert["alert"].lower()
    headings = re.findall(r"^#+ (.+)$", (ROOT / file).read_text(), re.MULTILINE)
    assert alert["alert"] in headings


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: f"{alert['alert']}-{alert['labels']['severity']}")
def test_an_alert_is_tested_both_ways(alert: dict[str, Any]) -> None:
    """The tests themselves need promtool; that there are some does not."""
    tests = [
        test.get("exp_alerts", [])
        for case in TESTS
        for test in case.get("alert_rule_test", [])
        if test["alertname"] == alert["alert"]
    ]
    severities = [{expected["exp_labels"]["severity"] for expected in test} for test in tests]
    assert any(alert["labels"]["severity"] in found for found in severities), "fires"
    assert any(alert["labels"]["severity"] not in found for found in severities), "does not fire"


def test_the_objective_of_batches_is_a_bound_of_the_histogram(known: Exposed) -> None:
    [slo] = [rule["expr"] for rule in RECORDINGS if rule["record"] == "ai_ticket:pipeline_batch_duration_seconds:slo"]
    bounds = known.values["ai_ticket_pipeline_batch_duration_seconds_bucket", "le"]
    assert float(re.fullmatch(r"vector\((\d+)\)", slo)[1]) in {float(bound) for bound in bounds}  # type: ignore[index]


def test_another_namespace(tmp_path: Path) -> None:
    """As the runbook says: all our names begin with the namespace, and recorded ones do not."""
    known = exposed(tmp_path, METRICS_NAMESPACE="acme")
    for rule in ALERTS + RECORDINGS:
        query = rule["expr"].replace("ai_ticket_", "acme_")
        assert list(problems(query, known)) == []
        promql_parser.parse(query)


@promtool
def test_promtool_finds_nothing_in_the_rules() -> None:
    run("promtool", "check", "config", str(PROMETHEUS / "prometheus.yml"))
    run("promtool", "check", "rules", *(str(PROMETHEUS / file) for file in ("recording.yml", "alerts.yml")))


@promtool
def test_promtool_finds_nothing_in_the_metrics(known: Exposed) -> None:
    run("promtool", "check", "metrics", stdin=known.text)


@promtool
@pytest.mark.parametrize("file", sorted(os.listdir(PROMETHEUS / "tests")))
def test_the_alerts_fire_and_do_not_fire(file: str) -> None:
    run("promtool", "test", "rules", str(PROMETHEUS / "tests" / file))
