"""What is looked at before a start, beyond the values themselves."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme

from ai_ticket import memory, preflight
from ai_ticket.environment import load
from ai_ticket.settings import Settings


@pytest.mark.parametrize("url", ["local:/nowhere.gguf", "http://a|http://b,local:/nowhere.gguf"])
def test_the_model_of_a_bundled_server_wherever_it_stands(url: str) -> None:
    problems = preflight.problems(Settings(koboldcpp_api_url=url, ai_ticket_auth=False))
    assert [problem for problem in problems if problem.startswith(f"KOBOLDCPP_API_URL={url!r}: ")]


def test_servers_elsewhere_need_nothing_on_this_machine() -> None:
    problems = preflight.problems(Settings(koboldcpp_api_url="http://a|http://b,http://c", ai_ticket_auth=False))
    assert not [problem for problem in problems if problem.startswith("KOBOLDCPP")]


def test_several_processes_need_what_only_linux_has(monkeypatch: pytest.MonkeyPatch) -> None:
    found = "WORKERS='2': must be 1 on this system: more needs Linux"
    assert found not in preflight.problems(Settings(workers="2"))
    monkeypatch.delattr(os, "memfd_create")
    assert found in preflight.problems(Settings(workers="2"))
    assert found not in preflight.problems(Settings(workers="1"))


def warned(tmp_path: Path, **environ: str) -> list[str]:
    return preflight.warnings(
        load(
            {
                "AI_TICKET_ENV_FILE": str(tmp_path / "my.env"),
                "AI_TICKET_AUTH_TOKEN_FILE": str(tmp_path / "tokens"),
                "TLS_KEY_FILE": str(tmp_path / "server.key"),
                "TLS_CERT_FILE": str(tmp_path / "server.crt"),
                **environ,
            }
        )
    )


@pytest.mark.parametrize(
    ("mode", "can"), [(0o600, None), (0o604, "read"), (0o602, "change"), (0o644, "read"), (0o666, "read and change")]
)
def test_files_that_others_may_read(tmp_path: Path, mode: int, can: str | None) -> None:
    (tmp_path / "my.env").write_text("KOBOLDCPP_PASSWORD=sesame\n")
    for name in ("my.env", "tokens", "server.key"):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)
    found = warned(tmp_path)
    if can is None:
        assert found == []
        return
    assert found == [
        f"{variable}: every user of this machine may {can} {tmp_path}/{name} (mode {mode:04o}); chmod 600 it"
        for variable, name in (
            ("AI_TICKET_ENV_FILE", "my.env"),
            ("AI_TICKET_AUTH_TOKEN_FILE", "tokens"),
            ("TLS_KEY_FILE", "server.key"),
        )
    ]


@pytest.mark.parametrize(("mode", "can"), [(0o640, "read"), (0o620, "change"), (0o660, "read and change")])
def test_files_that_a_group_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, can: str) -> None:
    """Only where they are ours: by its group a service of its own user gets to see what root keeps."""
    key = tmp_path / "server.key"
    key.touch()
    key.chmod(mode)
    (tmp_path / "my.env").touch()
    said = f"TLS_KEY_FILE: the group {key.stat().st_gid} may {can} {key} (mode {mode:04o}); chmod 600 it"
    assert warned(tmp_path, AI_TICKET_AUTH="off", BIND_HOST="::1") == [said]
    monkeypatch.setattr(os, "geteuid", lambda: key.stat().st_uid + 1)
    assert warned(tmp_path, AI_TICKET_AUTH="off", BIND_HOST="::1") == []


def test_a_group_may_do_more_than_everyone(tmp_path: Path) -> None:
    (tmp_path / "server.key").touch()
    (tmp_path / "server.key").chmod(0o664)
    (tmp_path / "my.env").touch()
    everyone, group = warned(tmp_path, AI_TICKET_AUTH="off", BIND_HOST="::1")
    assert ("every user of this machine may read" in everyone, "may change" in group) == (True, True)


@pytest.mark.parametrize(("megabytes", "good"), [("0", True), ("127", False), ("128", True), ("60", False)])
def test_a_limit_of_memory_that_the_service_does_not_fit_in(tmp_path: Path, megabytes: str, good: bool) -> None:
    (tmp_path / "my.env").touch()
    found = warned(tmp_path, AI_TICKET_AUTH="off", BIND_HOST="::1", MEMORY_LIMIT_MB=megabytes)
    said = f"MEMORY_LIMIT_MB limits memory to {megabytes} MB: what is refused near that limit may be refused for ever"
    assert [line.partition(";")[0] for line in found] == ([] if good else [said])


def test_a_control_group_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "cgroup_limit", lambda: 100 * memory.MEGABYTE)
    (tmp_path / "my.env").touch()
    [line] = warned(tmp_path, AI_TICKET_AUTH="off", BIND_HOST="::1")
    assert line.startswith("the control group limits memory to 100 MB: ")


def test_a_limit_of_memory_where_nothing_is_known_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "used_memory", lambda: None)
    (tmp_path / "my.env").touch()
    [line] = warned(tmp_path, AI_TICKET_AUTH="off", BIND_HOST="::1", MEMORY_LIMIT_MB="500")
    assert line.startswith("MEMORY_LIMIT_MB: of no effect")


@pytest.mark.parametrize(("days", "what"), [(-1, "has expired on"), (13, "expires on"), (15, None)])
def test_a_certificate_that_callers_refuse_or_soon_will(tmp_path: Path, days: int, what: str | None) -> None:
    """It does not keep the service from starting: an old certificate may be better than none."""
    ends = datetime.now(UTC) + timedelta(days=days, minutes=1)
    issued = trustme.CA().issue_cert("localhost", not_after=ends, not_before=ends - timedelta(days=90))
    issued.private_key_pem.write_to_path(tmp_path / "server.key")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "server.crt")
    (tmp_path / "server.key").chmod(0o600)
    (tmp_path / "my.env").touch()
    found = warned(tmp_path, AI_TICKET_AUTH="off", BIND_HOST="::1")
    if what is None:
        assert found == []
    else:
        [line] = found
        assert line.startswith(f"TLS_CERT_FILE='{tmp_path}/server.crt': the certificate {what} {ends:%Y-%m-%d %H:%M}")
    settings = Settings(
        ai_ticket_auth=False, tls_cert_file=str(tmp_path / "server.crt"), tls_key_file=str(tmp_path / "server.key")
    )
    assert preflight.problems(settings) == []


@pytest.mark.parametrize("text", ["LOG_LEVEL=INFO\n", "KOBOLDCPP_PASSWORD=\n"])
def test_an_environment_file_without_a_secret_is_anyones_to_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "my.env").write_text(text)
    (tmp_path / "my.env").chmod(0o644)
    assert warned(tmp_path, AI_TICKET_AUTH="off", BIND_HOST="::1") == []


@pytest.mark.parametrize(
    ("host", "where"),
    [
        ("127.0.0.1", None),
        ("127.1.2.3", None),
        ("::1", None),
        ("localhost", None),
        ("", "all addresses"),
        ("0.0.0.0", "0.0.0.0"),
        ("192.0.2.1", "192.0.2.1"),
    ],
)
def test_a_door_that_is_open_to_anyone(tmp_path: Path, host: str, where: str | None) -> None:
    (tmp_path / "my.env").touch()
    found = warned(tmp_path, AI_TICKET_AUTH="off", BIND_HOST=host)
    said = f"AI_TICKET_AUTH=off: whoever reaches this machine may call, for the service listens on {where}"
    assert found == ([] if where is None else [said])
