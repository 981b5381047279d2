"""`ai-ticket token` and the token file."""

import hashlib
import os
import re
import stat
from pathlib import Path

import pytest

from ai_ticket.cli import main, token_file
from ai_ticket.cli.token_file import parse
from ai_ticket.tokens import LARGEST_WEIGHT, Line, parse_tokens


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def make(capsys, *arguments):
    """Run the command; the token is all that stdout has."""
    assert main(["token", *arguments]) == 0
    captured = capsys.readouterr()
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}\n", captured.out)
    return captured.out.strip(), captured.err


def test_a_new_file_is_its_owners_alone(capsys):
    """Whatever the umask; so is its folder."""
    before = os.umask(0)
    try:
        token, said = make(capsys, "bob", "--file", "new/tokens")
    finally:
        os.umask(before)
    assert Path("new/tokens").read_text() == f"bob {token}\n"
    assert mode("new/tokens") == 0o600
    assert mode("new") == 0o700
    assert "bob: token added in new/tokens" in said
    assert "AI_TICKET_AUTH_TOKEN_FILE=new/tokens" in said
    assert token not in said


def test_default_file(capsys):
    token, _ = make(capsys, "bob")
    assert Path("ops/secrets/ai_ticket_auth_token.txt").read_text() == f"bob {token}\n"


@pytest.mark.parametrize("where", ["environment", "file"])
def test_the_file_of_the_settings(where, capsys, monkeypatch):
    """Found even though nothing else is configured, or what else there is is wrong."""
    if where == "environment":
        monkeypatch.setenv("AI_TICKET_AUTH_TOKEN_FILE", "mine")
        monkeypatch.setenv("QUEUE_LIMIT", "rubbish")
    else:
        Path(".env").write_text("AI_TICKET_AUTH_TOKEN_FILE=mine\nKOBOLDCPP_PASSWORD_FILE=/nowhere\nTLS_PORT=x\n")
    token, said = make(capsys, "bob")
    assert Path("mine").read_text() == f"bob {token}\n"
    assert "AI_TICKET_AUTH_TOKEN_FILE" not in said


def test_settings_that_cannot_be_read(capsys):
    """They stop the command only where they are asked for the file."""
    Path(".env").write_text("=x\n")
    assert main(["token", "bob"]) == 1
    assert ".env:1: not a line" in capsys.readouterr().err
    make(capsys, "bob", "--file", "tokens")


def test_hash_keeps_no_plain_text(capsys):
    token, said = make(capsys, "bob", "--file", "tokens", "--hash")
    assert Path("tokens").read_text() == f"bob sha256:{hashlib.sha256(token.encode()).hexdigest()}\n"
    assert "the one time" in said


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"# ours\n\n  alice  secret\nplain-token\n",
        b"alice secret",
        b"\xff\xfe \xe9\r\n",
        b"a\x0bb c\xe2\x80\xa8\n",
    ],
)
def test_other_lines_and_the_mode_are_kept(content, capsys):
    """Byte for byte, whatever they are."""
    path = Path("tokens")
    path.write_bytes(content)
    path.chmod(0o640)
    token, said = make(capsys, "bob", "--file", "tokens")
    separator = b"" if not content or content.endswith(b"\n") else b"\n"
    assert path.read_bytes() == content + separator + f"bob {token}\n".encode()
    assert mode(path) == 0o640
    assert "warning: tokens may be read or written by others than its owner (mode 0640)" in said
    assert [child.name for child in Path().iterdir()] == ["tokens"]


@pytest.mark.parametrize(
    "line",
    ["bob secret", "bob sha256:00", "\tbob   secret  ", "bob;weight=2 secret", "bob;x secret", "\ufeffbob secret"],
)
def test_a_name_that_is_taken(line, capsys):
    Path("tokens").write_text(f"{line}\n")
    assert main(["token", "bob", "--file", "tokens"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: name_taken: tokens has a token named bob." in captured.err
    assert "secret" not in captured.err
    assert Path("tokens").read_text() == f"{line}\n"


@pytest.mark.parametrize("line", ["# bob secret", "bob", "bobby secret", "bob too many"])
def test_what_is_no_token_of_that_name(line, capsys):
    Path("tokens").write_text(f"{line}\n")
    token, _ = make(capsys, "bob", "--file", "tokens")
    assert Path("tokens").read_text() == f"{line}\nbob {token}\n"


def test_replace_swaps_the_line(capsys):
    """In its place, every one of that name, so that no old token stays valid."""
    Path("tokens").write_text("# head\nbob old\nalice hers\nbob older\n# tail")
    token, said = make(capsys, "bob", "--file", "tokens", "--replace")
    assert Path("tokens").read_text() == f"# head\nbob {token}\nalice hers\n# tail"
    assert "token replaced" in said


@pytest.mark.parametrize("arguments", [[], ["--hash"]])
def test_a_weight(arguments, capsys):
    """As the service reads it."""
    make(capsys, "bob", "--file", "tokens", "--weight", "4", *arguments)
    [token] = parse_tokens(Path("tokens").read_text())
    assert (token.name, token.weight) == ("bob", 4)


@pytest.mark.parametrize("weight", ["0", str(LARGEST_WEIGHT + 1), "-1", "1.5", "many", ""])
def test_what_is_no_weight(weight, capsys):
    with pytest.raises(SystemExit):
        main(["token", "bob", "--file", "tokens", "--weight", weight])
    assert f"is not a whole number from 1 to {LARGEST_WEIGHT}" in capsys.readouterr().err
    assert not Path("tokens").exists()


def test_replace_keeps_the_weight_unless_it_gets_one(capsys):
    Path("tokens").write_text("bob;weight=4 old\n")
    token, _ = make(capsys, "bob", "--file", "tokens", "--replace")
    assert Path("tokens").read_text() == f"bob;weight=4 {token}\n"
    token, _ = make(capsys, "bob", "--file", "tokens", "--replace", "--weight", "7")
    assert Path("tokens").read_text() == f"bob;weight=7 {token}\n"


def test_replace_adds_a_new_name(capsys):
    token, said = make(capsys, "bob", "--file", "tokens", "--replace")
    assert Path("tokens").read_text() == f"bob {token}\n"
    assert "token added" in said


def test_a_link_stays_a_link(capsys):
    Path("real").mkdir()
    Path("real/tokens").write_text("alice hers\n")
    Path("tokens").symlink_to("real/tokens")
    token, _ = make(capsys, "bob", "--file", "tokens")
    assert Path("tokens").is_symlink()
    assert Path("real/tokens").read_text() == f"alice hers\nbob {token}\n"


@pytest.mark.parametrize("path", ["a-folder", "a-file/tokens", "/dev/null"])
def test_what_cannot_be_a_token_file(path, capsys):
    Path("a-folder").mkdir()
    Path("a-file").write_text("")
    assert main(["token", "bob", "--file", path]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: token_file_error: {path} can't be written: ")


def test_a_failed_write_leaves_the_old_file(capsys, monkeypatch):
    """And nothing beside it."""
    Path("tokens").write_text("alice hers\n")

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    assert main(["token", "bob", "--file", "tokens"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert Path("tokens").read_text() == "alice hers\n"
    assert [child.name for child in Path().iterdir()] == ["tokens"]


def test_the_owner_is_kept(monkeypatch):
    """Before the mode, so that no moment shows the token to anybody else; where that may not be, nothing is changed."""
    path = Path("tokens")
    path.write_text("alice hers\n")
    path.chmod(0o640)
    done = []
    status = os.stat(path)
    other = os.stat_result((*status[:4], status.st_uid + 1, status.st_gid + 1, *status[6:]))
    monkeypatch.setattr(token_file, "_read", lambda path: ("alice hers\n", other))
    monkeypatch.setattr(os, "fchown", lambda descriptor, uid, gid: done.append((uid, gid, mode(descriptor))))
    token_file.store(path, Line("x", "bob"), replace=False)
    assert done == [(status.st_uid + 1, status.st_gid + 1, 0o600)]

    def refused(descriptor, uid, gid):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refused)
    before = path.read_text()
    assert main(["token", "carol", "--file", "tokens"]) == 1
    assert path.read_text() == before


def test_many_at_once(start):
    """Each finds its line in the file at the end."""
    processes = [start("token", f"user{number}", "--file", "tokens") for number in range(6)]
    tokens = {f"user{number} {process.communicate()[0].decode().strip()}" for number, process in enumerate(processes)}
    assert set(Path("tokens").read_text().splitlines()) == tokens


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ("", None),
        ("  \n", None),
        ("# a comment", None),
        ("#comment", None),
        ("one two three", None),
        ("secret\r\n", Line("secret")),
        ("bob secret", Line("secret", "bob")),
        ("\ufeffbob secret", Line("secret", "bob")),
        ("bob sha256:00", Line("sha256:00", "bob")),
        ("sha256:00", Line("sha256:00")),
        ("bob;weight=4 secret", Line("secret", "bob", "weight=4")),
        ("bob; secret", Line("secret", "bob", "")),
        ("b;o;b secret", Line("secret", "b", "o;b")),
        ("s;ecret", Line("s;ecret")),
    ],
)
def test_lines(line, read):
    assert parse(line) == read
