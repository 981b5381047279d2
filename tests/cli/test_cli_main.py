"""`ai_ticket.cli.main`: the parser, what every command has in common, and how little `--help` loads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ai_ticket import __version__
from ai_ticket.cli import main
from ai_ticket.cli.outcome import CommandError, ExitStatus

ROOT = Path(__file__).parents[2]
COMMANDS = ("check-config", "token", "send", "health", "fetch-model", "fake-backend", "batch")


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"ai-ticket {__version__}\n"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_the_exit_statuses(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*command.split(), "--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {status:<5}" in shown for status in ExitStatus)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["token"],
        ["token", "a b"],
        ["token", ""],
        ["token", "a" * 65],
        ["token", "é"],
        ["token", "a\n"],
        ["send", "hi", "--temperature", "nan"],
        ["send", "hi", "--timeout", "0"],
        ["send", "hi", "--max-tokens", "many"],
        ["send", "hi", "--metadata", "no-value"],
        ["send", "hi", "--metadata", "=no-key"],
        ["send", "hi", "--insecure"],
        ["fake-backend", "--port", "65536"],
        ["fake-backend", "--port", "-1"],
        ["fake-backend", "--context", "x"],
        ["fake-backend", "--tokens-per-second", "0"],
        ["fake-backend", "--tokens-per-second", "nan"],
        ["fake-backend", "--first-token-seconds", "-1"],
        ["fake-backend", "--echo", "--text", "hi"],
    ],
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: ai-ticket" in captured.err


def test_help_loads_neither_twisted_nor_rich():
    """What a command needs is loaded when it runs."""
    script = (
        "import sys; from ai_ticket.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: sys.exit(bool({'twisted', 'rich', 'treq', 'msgspec'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, stdout=subprocess.DEVNULL).returncode == 0
    )


@pytest.fixture
def fails_with(monkeypatch):
    """Makes a command that fails so."""

    def fails_with(error):
        def run(options):
            raise error

        monkeypatch.setattr("ai_ticket.cli.health.run", run)

    return fails_with


def test_ctrl_c(fails_with):
    fails_with(KeyboardInterrupt())
    assert main(["health"]) == 130


def test_an_unforeseen_exception_is_one_line(fails_with, capsys):
    fails_with(ZeroDivisionError("division by zero"))
    assert main(["health"]) == 1
    assert capsys.readouterr() == ("", "error: internal_error: ZeroDivisionError: division by zero\n")


def test_an_error_says_all_it_knows(fails_with, capsys):
    """Control characters are spelt out: a server must not drive the terminal."""
    fails_with(
        CommandError(
            "overloaded",
            "Too many\x1b[2J.",
            status=ExitStatus.TRY_LATER,
            details="first\nsecond",
            request_id="r-1",
            retry_after=3,
        )
    )
    assert main(["health"]) == 75
    assert capsys.readouterr().err.splitlines() == [
        "error: overloaded: Too many\\x1b[2J.",
        "  first",
        "  second",
        "  request id: r-1",
        "  try again in 3 s",
    ]


def test_an_error_of_our_own_as_json(fails_with, capsys):
    """It has the shape of the service's errors, on one line, and a person is told as well."""
    fails_with(CommandError("unreachable", "Can't.", status=ExitStatus.UNREACHABLE, details="a\nb"))
    assert main(["health", "--json"]) == 3
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    assert json.loads(captured.out) == {
        "error": "unreachable",
        "message": "Can't.",
        "details": "a\nb",
        "request_id": None,
    }
    assert captured.err.startswith("error: unreachable: Can't.\n")


def test_a_reader_that_has_gone(start):
    """`ai-ticket ... | true` ends without a traceback."""
    process = start("token", "bob", "--file", "tokens")
    process.stdout.close()
    assert process.wait() == 1
    error = process.stderr.read()
    assert b"Traceback" not in error
    assert b"Exception" not in error
