"""`ai-ticket check-config`."""

import io
import json
import sys
from pathlib import Path

import pytest

from ai_ticket.cli import main
from ai_ticket.settings import variables

SECRET = "s3cr3t-t0k3n"


@pytest.fixture
def found(monkeypatch):
    """What the checks of the machine find: a list for a test to fill."""
    found: list[str] = []
    monkeypatch.setattr("ai_ticket.preflight.problems", lambda settings: list(found))
    return found


@pytest.fixture(autouse=True)
def _a_token(monkeypatch):
    monkeypatch.setenv("AI_TICKET_AUTH_TOKEN", SECRET)


def test_each_setting_with_its_source(capsys, monkeypatch, tmp_path, found):
    """One a line, greppable, secrets masked, values that have spaces quoted."""
    Path(".env").write_text("LOG_LEVEL=debug\nTLS_PORT=1\nTLS_CERT_FILE='my certificate.pem'\n")
    monkeypatch.setenv("TLS_PORT", "9443")
    monkeypatch.setenv("KOBOLDCPP_API_URL", "http://[::1]:5001")
    assert main(["check-config"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.partition("=")[0] for line in lines] == list(variables())
    assert "TLS_PORT=9443  # environment" in lines
    assert f"LOG_LEVEL=DEBUG  # {tmp_path}/.env" in lines
    assert f"TLS_CERT_FILE='my certificate.pem'  # {tmp_path}/.env" in lines
    assert "KOBOLDCPP_API_URL='http://[::1]:5001'  # environment" in lines
    assert "AI_TICKET_AUTH_TOKEN=********  # environment" in lines
    assert "KOBOLDCPP_PASSWORD=  # default" in lines
    assert "AI_TICKET_AUTH=on  # default" in lines
    assert "HTTP_PORT=  # default" in lines
    assert "REQUEST_TIMEOUT_SECONDS=120  # default" in lines
    assert SECRET not in captured.out + captured.err
    assert captured.err == ""


def test_warnings(capsys, monkeypatch, found):
    """They come after the settings, and do not make it fail."""
    monkeypatch.setenv("KOBOLDCPP_SLOT", "2")
    assert main(["check-config"]) == 0
    assert capsys.readouterr().err == "warning: KOBOLDCPP_SLOT: unknown variable; did you mean KOBOLDCPP_SLOTS?\n"


@pytest.mark.parametrize("as_json", [False, True])
def test_warnings_of_the_machine(as_json, capsys, monkeypatch, found):
    monkeypatch.setenv("AI_TICKET_AUTH", "off")
    assert main(["check-config", *(["--json"] if as_json else [])]) == 0
    captured = capsys.readouterr()
    warnings = json.loads(captured.out)["warnings"] if as_json else captured.err.splitlines()
    assert len(warnings) == 1
    assert "AI_TICKET_AUTH=off: whoever reaches this machine may call" in warnings[0]


def test_settings_that_cannot_be_used(capsys, monkeypatch):
    """One line each, and no secret."""
    monkeypatch.setenv("TLS_PORT", "rubbish")
    monkeypatch.setenv("LOG_LEVEL", "loud")
    assert main(["check-config"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.partition("=")[0] for line in captured.err.splitlines()] == ["error: TLS_PORT", "error: LOG_LEVEL"]
    assert SECRET not in captured.err


def test_problems_of_the_machine(capsys, found):
    found += ["TLS_CERT_FILE='x': no such file", "TLS_KEY_FILE='y': no such file"]
    assert main(["check-config"]) == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == len(variables())
    assert captured.err == "error: TLS_CERT_FILE='x': no such file\nerror: TLS_KEY_FILE='y': no such file\n"


def test_the_real_checks(capsys):
    """Here there is no certificate."""
    assert main(["check-config"]) == 1
    assert "error: TLS_CERT_FILE='ops/certs/server.crt'" in capsys.readouterr().err


def test_json(capsys, monkeypatch, found):
    found.append("a problem")
    monkeypatch.setenv("KOBOLDCPP_PASWORD", "x")
    assert main(["check-config", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    shown = json.loads(captured.out)
    assert list(shown["settings"]) == list(variables())
    assert shown["settings"]["AI_TICKET_AUTH_TOKEN"] == {"value": "********", "source": "environment"}
    assert shown["settings"]["TLS_PORT"] == {"value": 8443, "source": "default"}
    assert shown["settings"]["HTTP_PORT"]["value"] is None
    assert shown["warnings"] == ["KOBOLDCPP_PASWORD: unknown variable; did you mean KOBOLDCPP_PASSWORD?"]
    assert shown["problems"] == ["a problem"]
    assert captured.err == "error: a problem\n"


def test_json_of_settings_that_cannot_be_used(capsys, monkeypatch):
    monkeypatch.setenv("TLS_PORT", "rubbish")
    assert main(["check-config", "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["settings"] == {}
    assert shown["problems"][0].startswith("TLS_PORT='rubbish'")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_table_on_a_terminal(monkeypatch, found):
    """Brackets in a value are no markup, secrets are masked there too."""
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("KOBOLDCPP_API_URL", "http://[::1]:5001")
    assert main(["check-config"]) == 0
    shown = sys.stdout.getvalue()
    assert "http://[::1]:5001" in shown
    assert "********" in shown
    assert SECRET not in shown
