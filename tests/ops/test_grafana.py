"""ops/grafana/ai-ticket.json is a dashboard that Grafana takes, and asks for what the service has."""

import json
import re
from itertools import combinations
from typing import Any

import pytest
from daemon import ROOT
from promql import Exposed, exposed, problems

DASHBOARD = json.loads((ROOT / "ops/grafana/ai-ticket.json").read_text())
PANELS = DASHBOARD["panels"]
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
VARIABLES = {"$__rate_interval": "1m", "$job": "ai-ticket", "$instance": ".+"}

QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel.get("targets", ())]
QUERIES += [(each["name"], each["expr"]) for each in DASHBOARD["annotations"]["list"] if "expr" in each]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Exposed:
    return exposed(tmp_path_factory.mktemp("service"))


def filled_in(query: str) -> str:
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query
    return query


@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_a_query_asks_for_what_there_is(title: str, query: str, known: Exposed) -> None:
    assert list(problems(filled_in(query), known)) == []


def test_every_family_is_shown(known: Exposed) -> None:
    everything = " ".join(query for _, query in QUERIES)
    for name in known.labels:
        if name.startswith("ai_ticket_"):
            family = re.sub(r"_(bucket|sum|count)$", "", name)
            assert re.search(rf"\b{family}(_bucket|_sum|_count)?\b", everything), family


def test_the_data_source_is_chosen_in_the_dashboard() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    shown = [panel for panel in PANELS if panel["type"] != "row"]
    for part in [*shown, *(target for panel in shown for target in panel["targets"])]:
        assert part["datasource"] == DATASOURCE
    assert variables["job"]["datasource"] == variables["instance"]["datasource"] == DATASOURCE


def test_what_the_variables_are_taken_from(known: Exposed) -> None:
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            assert variable["query"]["query"] == variable["definition"]
            found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"])
            assert found is not None
            assert list(problems(filled_in(found[1]), known)) == []
            assert found[2] == variable["name"] in known.labels["ai_ticket_build_info"]


def test_panels_can_be_told_apart_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        targets = panel.get("targets", [])
        assert [target["refId"] for target in targets] == [chr(65 + number) for number in range(len(targets))]
        assert bool(targets) == (panel["type"] != "row")
    for one, other in combinations(PANELS, 2):
        assert not _overlap(one["gridPos"], other["gridPos"]), (one["title"], other["title"])


def test_legends_name_labels_that_the_result_has() -> None:
    for panel in PANELS:
        for target in panel.get("targets", ()):
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                kept = re.findall(r"\bby \(([^)]+)\)", target["expr"])
                assert not kept or any(label in by.split(", ") for by in kept), (panel["title"], label)


def test_descriptions_name_alerts_that_there_are() -> None:
    alerts = set(re.findall(r"alert: (\w+)", (ROOT / "ops/prometheus/alerts.yml").read_text()))
    named = {name for panel in PANELS for name in re.findall(r"AiTicket\w+", panel.get("description", ""))}
    assert named == alerts


def _overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return (
        one["x"] < other["x"] + other["w"]
        and other["x"] < one["x"] + one["w"]
        and one["y"] < other["y"] + other["h"]
        and other["y"] < one["y"] + one["h"]
    )
