"""Where the log goes, by the command line of twistd."""

import os
from pathlib import Path

import pytest
from twisted.python.usage import Options

from ai_ticket.environment import ConfigurationError
from ai_ticket.twistd import log_file


def under(parent: dict[str, object] | None) -> Options:
    """The options of a plugin under such a program."""
    options = Options()
    options.parent = parent
    return options


def opened(folder: Path, monkeypatch: pytest.MonkeyPatch, options: Options, argv: list[str]) -> str | None:
    """The file that a line comes to, which is written to what is opened."""
    monkeypatch.chdir(folder)
    log = log_file(options, argv)
    if log is None:
        assert not os.listdir(folder)
        return None
    assert log.write(b"a line\n") == 7
    os.close(log._fd)
    [name] = os.listdir(folder)
    assert (folder / name).read_text() == "a line\n"
    assert (folder / name).stat().st_mode & 0o137 == 0, "others may not read it"
    return name


@pytest.mark.parametrize(
    ("parent", "name"),
    [
        ({"nodaemon": 1, "logfile": None}, None),
        ({"nodaemon": 1, "logfile": "-"}, None),
        ({"nodaemon": 0, "debug": True, "logfile": None}, None),
        ({"nodaemon": 1, "logfile": "a.log"}, "a.log"),
        ({"nodaemon": 0, "logfile": "a.log"}, "a.log"),
        ({"nodaemon": 0, "logfile": None}, "twistd.log"),
        ({"logfile": "a.log"}, None),
    ],
    ids=repr,
)
def test_as_a_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parent: dict[str, object], name: str | None
) -> None:
    """The last is of a program that makes no daemon, and has a log of its own."""
    assert opened(tmp_path, monkeypatch, under(parent), ["twistd", "-n", "ai-ticket"]) == name


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("/usr/bin/twistd -ny ai_ticket.tac", None),
        ("/usr/bin/twistd -n --logfile=a.log -y ai_ticket.tac", "a.log"),
        ("twistd --logf a.log --python ai_ticket.tac", "a.log"),
        ("twistd -l a.log -oy ai_ticket.tac", "a.log"),
        ("twistd3 -y ai_ticket.tac", "twistd.log"),
        ("twistd -by ai_ticket.tac", None),
        ("twistd --no-such-option", None),
        ("pytest -y x", None),
    ],
)
def test_as_a_tac_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str | None) -> None:
    assert opened(tmp_path, monkeypatch, under(None), command.split()) == name


def test_without_a_command_line() -> None:
    assert log_file(under(None), []) is None


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("twistd --syslog -y x", "--syslog: the log goes to standard output, or to the file that --logfile names"),
        ("twistd -n --syslog -y x", "--syslog: the log goes to standard output, or to the file that --logfile names"),
        ("twistd -l - -y x", "--logfile=-: a daemon has no standard output; name a file, or add --nodaemon"),
        ("twistd -l /nowhere/x -y x", "--logfile='/nowhere/x': No such file or directory"),
    ],
)
def test_where_it_can_not_go(command: str, reason: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        log_file(under(None), command.split())
    assert caught.value.problems == [reason]


def test_a_file_that_is_there_is_added_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.log").write_text("before\n")
    log = log_file(under({"nodaemon": 0, "logfile": "a.log"}), [])
    assert log is not None
    log.write(b"after\n")
    os.close(log._fd)
    assert Path("a.log").read_text() == "before\nafter\n"
