"""ops/runbook.md names nothing that is not there: files, settings, commands, paths, metrics, errors."""

import os
import re
import shlex
import subprocess

import pytest
from daemon import ROOT
from promql import Exposed, exposed, problems, rules
from surface import make_surface

from ai_ticket.cli.arguments import parser
from ai_ticket.environment import ENV_FILE, FILE_TWINS, load
from ai_ticket.settings import variables
from ai_ticket.web.faults import STATUSES

RUNBOOK = (ROOT / "ops/runbook.md").read_text()
BLOCKS = [
    re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)
    for indent, code in re.findall(r"^( *)```bash\n(.*?)^ *```$", RUNBOOK, re.MULTILINE | re.DOTALL)
]
COMMANDS = "\n".join(BLOCKS)
LIVE = {"AI_TICKET_AUTH_TOKEN", "LOG_LEVEL", "LOG_PAYLOADS", "MAX_CONCURRENCY", "MEMORY_LIMIT_MB"}
"""What SIGHUP puts into force."""
MADE = {".env", "ops/certs/server.crt", "ops/secrets/ai_ticket_auth_token.txt"}
"""What ops/bootstrap.sh makes."""


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Exposed:
    folder = tmp_path_factory.mktemp("service")
    return exposed(folder, RATE_LIMIT_BACKEND="redis", REDIS_URL="redis://localhost")


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_is_of_bash(block: str) -> None:
    done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize("query", re.findall(r"^query '(.+)'$", COMMANDS, re.MULTILINE))
def test_a_query_asks_for_what_there_is(query: str, known: Exposed) -> None:
    assert list(problems(query, known)) == []


def test_every_family_is_explained_and_nothing_else_is_named(known: Exposed) -> None:
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in known.labels if name.startswith("ai_ticket_")}
    named = set(re.findall(r"(?<![\w/])ai_ticket_\w*[a-z]\b", RUNBOOK)) - {"ai_ticket_auth_token"}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in named} == families


def test_settings_that_there_are() -> None:
    named = set(re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", RUNBOOK))
    assert named <= {*variables(), *FILE_TWINS, ENV_FILE}
    for block in BLOCKS:
        environ = {"AI_TICKET_AUTH": "off", ENV_FILE: os.devnull}
        for name, value in re.findall(r"^set_to (\w+) (.+)$", block, re.MULTILINE):
            environ[name] = shlex.split(value)[0]
            load(environ)


def test_what_is_reloaded_is_what_can_be() -> None:
    """All else needs a restart."""
    for block in BLOCKS:
        names = set(re.findall(r"^set_to (\w+)", block, re.MULTILINE))
        if names:
            assert ("restart" in block) != ("reload" in block)
            assert names <= LIVE or "restart" in block


def test_commands_of_ours_are_understood() -> None:
    lines = re.findall(r'"\$bin/ai-ticket" ([^|&>\n]+)', COMMANDS)
    assert len(lines) > 5
    for line in lines:
        parser().parse_args(shlex.split(line))


def test_files_that_there_are() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", RUNBOOK) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / "ops" / link).exists(), link
    for name in set(re.findall(r"(?<![\w/.])(?:ops|etc)/[\w/.-]*\w", RUNBOOK)) - MADE:
        assert (ROOT / name).exists(), name


def test_options_of_scripts() -> None:
    used = re.findall(r"(ops/[\w-]+\.sh) (--\w+)", RUNBOOK)
    assert used
    for script, option in used:
        assert re.search(rf"^ +{option}(\)| \|)", (ROOT / script).read_text(), re.MULTILINE), (script, option)


def test_units_of_systemd() -> None:
    for unit in set(re.findall(r"(?:systemctl [\w-]+|--unit) ([\w-]+)", RUNBOOK)):
        assert (ROOT / f"etc/systemd/{unit}.service").exists()


def test_paths_that_are_served() -> None:
    surface = make_surface()
    paths = set(re.findall(r"\$url(/[\w/]*)", RUNBOOK)) | set(re.findall(r"`(/[\w/]+)`", RUNBOOK))
    assert len(paths) > 3
    for path in paths:
        [(status, _, _)] = surface.http1(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        assert status != 404, path


def test_links_within_lead_to_headings() -> None:
    headings = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles()}
    for anchor in re.findall(r"\]\(#([\w-]+)\)", RUNBOOK):
        assert anchor in headings


def test_every_alert_has_its_section_and_its_row() -> None:
    alerts = {rule["alert"] for rule in rules("alerts.yml")}
    assert {title for title in titles() if title.startswith("AiTicket")} == alerts
    assert set(re.findall(r"\| \[(\w+)\]\(#\w+\) \|", RUNBOOK)) == alerts


def test_every_failure_has_its_row() -> None:
    """Of an answer with 500 and above it says what to do."""
    rows = dict(re.findall(r"^\| (`.+?) \((.+?)\) \|", RUNBOOK, re.MULTILINE))
    explained = {code: statuses for codes, statuses in rows.items() for code in re.findall(r"`(\w+)`", codes)}
    assert explained.keys() == {code for code, status in STATUSES.items() if status >= 500}
    for code, statuses in explained.items():
        assert str(STATUSES[code]) in statuses


def titles() -> list[str]:
    return re.findall(r"^#+ (.+)$", RUNBOOK, re.MULTILINE)
