"""Settings: from the environment and the file, what is wrong with them, and where each came from."""

import os
from pathlib import Path
from typing import Any

import pytest

from ai_ticket.environment import ConfigurationError, Loaded, load, load_again, overridden
from ai_ticket.settings import variables

BASE = {"AI_TICKET_AUTH_TOKEN": "t"}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def loaded(**environ: str) -> Loaded:
    return load({**BASE, **environ})


def problems(**environ: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        load({**BASE, **environ})
    return caught.value.problems


def test_defaults() -> None:
    found = loaded()
    assert found.settings.tls_port == 8443
    assert found.settings.koboldcpp_api_url == "http://localhost:5001/api"
    assert found.sources["TLS_PORT"] == "default"
    assert found.sources["AI_TICKET_AUTH_TOKEN"] == "environment"
    assert found.warnings == []


def test_every_setting_says_what_it_is() -> None:
    for variable in variables().values():
        assert variable.help
        assert variable.allowed
        assert variable.name == variable.field.upper()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("TLS_PORT", "0", 0),
        ("HTTP_PORT", " 8080 ", 8080),
        ("HTTP_PORT", "", None),
        ("METRICS_ON_TLS", "off", False),
        ("METRICS_ON_TLS", "TRUE", True),
        ("AI_TICKET_AUTH", "no", False),
        ("LOG_LEVEL", "debug", "DEBUG"),
        ("REQUEST_TIMEOUT_SECONDS", "1.5", 1.5),
        ("KOBOLDCPP_SLOTS", "4", "4"),
        ("KOBOLDCPP_MAX_ATTEMPTS", "10", 10),
        ("KOBOLDCPP_PASSWORD", "a b$c", "a b$c"),
        ("QUEUE_LIMIT", "0", 0),
    ],
)
def test_values(name: str, text: str, value: Any) -> None:
    assert getattr(loaded(**{name: text}).settings, name.lower()) == value


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("TLS_PORT", "65536", "a whole number from 0 to 65535"),
        ("TLS_PORT", "1.5", "a whole number from 0 to 65535"),
        ("TLS_PORT", "http", "a whole number from 0 to 65535"),
        ("METRICS_ON_TLS", "maybe", "on or off"),
        ("LOG_LEVEL", "loud", "one of DEBUG, INFO, WARN, WARNING, ERROR, CRITICAL"),
        ("REQUEST_TIMEOUT_SECONDS", "nan", "a number from 0.01 to 86400"),
        ("REQUEST_TIMEOUT_SECONDS", "inf", "a number from 0.01 to 86400"),
        ("KOBOLDCPP_SLOTS", "0", "a whole number from 1 to 1024"),
        ("METRICS_NAMESPACE", "a-b", "text that matches"),
        ("KOBOLDCPP_API_URL", "nonsense", "http:// or https:// URL, or local:"),
        ("KOBOLDCPP_SLOTS", "1025", "a whole number from 1 to 1024"),
        ("KOBOLDCPP_SLOTS", "two", "a whole number from 1 to 1024"),
        ("KOBOLDCPP_SLOTS", "1,2", "has 2 entries for 1 server: give one for all, or one for each"),
        ("KOBOLDCPP_MAX_ATTEMPTS", "0", "a whole number from 1 to 10"),
        ("KOBOLDCPP_MAX_ATTEMPTS", "11", "a whole number from 1 to 10"),
        ("KOBOLDCPP_API_URL", "http://a|nonsense", "'nonsense' must be an http:// or https:// URL, or local:"),
        ("KOBOLDCPP_API_URL", "http://a,http://a:80/api", "a:80 is named twice"),
        ("KOBOLDCPP_API_URL", "local:|local:/x.gguf", "local is named twice"),
        ("KOBOLDCPP_API_URL", "http://a,", "an address between the separators is missing"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_variable_value_and_what_is_allowed(
    name: str, text: str, allowed: str
) -> None:
    [line] = problems(**{name: text})
    assert line.startswith(f"{name}={text!r}: ")
    assert allowed in line


def test_passwords_and_slots_go_with_the_servers() -> None:
    three = "http://a|http://b,http://c"
    for good in ({}, {"KOBOLDCPP_SLOTS": "2"}, {"KOBOLDCPP_SLOTS": "2,,3", "KOBOLDCPP_PASSWORD": "x,,"}):
        assert loaded(KOBOLDCPP_API_URL=three, **good).settings.koboldcpp_api_url == three
    assert problems(KOBOLDCPP_API_URL=three, KOBOLDCPP_SLOTS="1,2", KOBOLDCPP_PASSWORD="s3cret,s4cret") == [
        "KOBOLDCPP_PASSWORD=(hidden): has 2 entries for 3 servers: give one for all, or one for each, in order",
        "KOBOLDCPP_SLOTS='1,2': has 2 entries for 3 servers: give one for all, or one for each, in order",
    ]


def test_all_problems_are_told_at_once() -> None:
    assert len(problems(TLS_PORT="x", QUEUE_LIMIT="-1", METRICS_ON_TLS="?")) == 3


def test_a_limit_below_the_default_is_no_contradiction() -> None:
    """The default is then as much as the limit allows."""
    assert loaded(MAX_TOKENS_LIMIT="100").settings.max_tokens_limit == 100


def test_an_address_with_a_password_in_it_is_not_shown() -> None:
    [line] = problems(KOBOLDCPP_API_URL="http://user:sesame@host")
    assert "sesame" not in line


def test_no_token_no_start() -> None:
    with pytest.raises(ConfigurationError, match="AI_TICKET_AUTH=off"):
        load({})
    assert not load({"AI_TICKET_AUTH": "off"}).settings.ai_ticket_auth
    assert load({"AI_TICKET_AUTH_TOKEN_FILE": "/x"}).settings.ai_ticket_auth


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        "# comment\nTLS_PORT=1\nexport HTTP_PORT='2'\nKOBOLDCPP_PASSWORD=\"a$b\"\nQUEUE_LIMIT=\n"
    )
    found = loaded(TLS_PORT="3")
    assert (found.settings.tls_port, found.settings.http_port) == (3, 2)
    assert found.settings.koboldcpp_password == "a$b"
    assert found.settings.queue_limit == 256
    assert found.sources["HTTP_PORT"] == str(tmp_path / ".env")


def test_another_file(tmp_path: Path) -> None:
    (tmp_path / "my.env").write_text("TLS_PORT=1\nAI_TICKET_ENV_FILE=/nowhere\n")
    assert loaded(AI_TICKET_ENV_FILE="my.env").settings.tls_port == 1
    assert "no such file" in problems(AI_TICKET_ENV_FILE="other.env")[0]


def test_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("TLS_PORT=1\n= what\n")
    assert problems()[0].startswith(f"{tmp_path}/.env:2: ")
    (tmp_path / ".env").write_bytes(b"\xff\xfe")
    assert "can't be read" in problems()[0]


def test_the_password_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "pw").write_text("sesame\n")
    found = loaded(KOBOLDCPP_PASSWORD_FILE=str(tmp_path / "pw"))
    assert found.settings.koboldcpp_password == "sesame"
    assert found.sources["KOBOLDCPP_PASSWORD"] == "KOBOLDCPP_PASSWORD_FILE (environment)"
    assert "can't be read" in problems(KOBOLDCPP_PASSWORD_FILE="/nowhere")[0]
    [line] = problems(KOBOLDCPP_PASSWORD_FILE=str(tmp_path / "pw"), KOBOLDCPP_PASSWORD="secret")
    assert "only one of the two" in line
    assert "secret" not in line


def test_unknown_names_get_the_nearest_known_one() -> None:
    found = loaded(KOBOLDCPP_PASWORD="x", AI_TICKET_NONSENSE_XYZ="x", HOME="/", TLSPORT="1")
    assert "KOBOLDCPP_PASWORD: unknown variable; did you mean KOBOLDCPP_PASSWORD?" in found.warnings
    assert len(found.warnings) == 2


def test_the_defaults_pass_their_own_bounds() -> None:
    for variable in variables().values():
        if variable.default is None:
            continue
        text = ("off", "on")[variable.default] if isinstance(variable.default, bool) else str(variable.default)
        assert getattr(loaded(**{variable.name: text or " "}).settings, variable.field) == variable.default


def test_tokens_that_are_none() -> None:
    assert problems(AI_TICKET_AUTH_TOKEN=" , ") == ["AI_TICKET_AUTH_TOKEN=(hidden): no token in it"]
    assert loaded(AI_TICKET_AUTH_TOKEN=",", AI_TICKET_AUTH_TOKEN_FILE="tokens").settings.ai_ticket_auth


def test_a_named_pipe_holds_nothing_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("AI_TICKET_ENV_FILE", "KOBOLDCPP_PASSWORD_FILE"):
        [line] = problems(**{name: str(tmp_path / "pipe")})
        assert "not a regular file" in line


def test_no_file_at_all(tmp_path: Path) -> None:
    """As the null device says it, also where there is a .env."""
    (tmp_path / ".env").write_text("TLS_PORT=1\n")
    assert loaded(AI_TICKET_ENV_FILE=os.devnull).settings.tls_port == 8443


def test_loaded_again_from_the_same_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the start, wherever the process is by now and whatever its environment says."""
    (tmp_path / ".env").write_text("KOBOLDCPP_PASSWORD_FILE=pw\nTLS_PORT=1\nHTTP_PORT=1\n")
    (tmp_path / "pw").write_text("old")
    environ = {**BASE, "HTTP_PORT": "3"}
    first = load(environ)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / ".env").write_text("KOBOLDCPP_PASSWORD_FILE=pw\nTLS_PORT=2\nHTTP_PORT=2\n")
    (tmp_path / "pw").write_text("new")
    environ["TLS_PORT"] = "4"
    again = load_again(first)
    assert (again.settings.tls_port, again.settings.http_port) == (2, 3)
    assert again.settings.koboldcpp_password == "new"
    assert again.sources["TLS_PORT"] == str(tmp_path / ".env")


def test_a_file_that_was_there_must_still_be(tmp_path: Path) -> None:
    """It may be about to be replaced; and without it, all that it says would be the default."""
    without = loaded()
    assert load_again(without).settings == without.settings
    (tmp_path / ".env").write_text("TLS_PORT=1\n")
    first = load_again(without)
    assert first.settings.tls_port == 1
    (tmp_path / ".env").unlink()
    with pytest.raises(ConfigurationError, match="no such file"):
        load_again(first)


def test_what_the_environment_overrides(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("LOG_LEVEL=DEBUG\nTLS_PORT=1\nAI_TICKET_AUTH_TOKEN=sesame\nQUEUE_LIMIT=\n")
    names = ["LOG_LEVEL", "AI_TICKET_AUTH_TOKEN", "MAX_CONCURRENCY", "QUEUE_LIMIT"]
    assert overridden(loaded(LOG_LEVEL="INFO", TLS_PORT="2", QUEUE_LIMIT="5"), names) == [
        f"LOG_LEVEL: the environment has INFO, which overrides DEBUG in {tmp_path}/.env",
        f"AI_TICKET_AUTH_TOKEN: the environment has (hidden), which overrides (hidden) in {tmp_path}/.env",
    ]
    assert overridden(loaded(LOG_LEVEL=" DEBUG ", AI_TICKET_AUTH_TOKEN="sesame"), names) == []
    [line] = overridden(loaded(LOG_LEVEL=""), ["LOG_LEVEL"])
    assert line.startswith("LOG_LEVEL: the environment has nothing, which overrides DEBUG")
