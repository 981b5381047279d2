"""SIGHUP: what is read anew, and what the log says of it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from few_calls import FewCalls
from harness import Recorded
from twisted.internet.defer import Deferred, execute
from twisted.logger import globalLogPublisher

from ai_ticket.environment import load
from ai_ticket.reload import LiveSettings, Reloadable
from ai_ticket.web.auth import Authenticator, TokenFile
from ai_ticket.web.tls import TlsConnections, server_context


class Running:
    """A service's settings, tokens and certificate, and what is logged of them."""

    def __init__(self, folder: Path) -> None:
        self.env_file = folder / "my.env"
        self.tokens = folder / "tokens"
        self.certificate = folder / "server.pem"
        self.environ = {"AI_TICKET_ENV_FILE": str(self.env_file), "AI_TICKET_AUTH_TOKEN_FILE": str(self.tokens)}
        self.taken: list[tuple[str, Any]] = []
        self.logged: list[tuple[str, str]] = []
        self.refused: str | None = None
        self.env_file.write_text("LOG_LEVEL=INFO\n")
        self.tokens.write_text("one\n")
        self.issue()

    def issue(self) -> None:
        trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(self.certificate)

    def start(self) -> None:
        loaded = load(self.environ)
        authenticator = Authenticator([], enabled=True, recorder=Recorded(), invalid_tokens=FewCalls())
        token_file = TokenFile(str(self.tokens), authenticator)
        token_file.load()
        files = str(self.certificate), str(self.certificate)
        self.tls = TlsConnections(server_context(*files, "intermediate"))
        self.reloadable = Reloadable(
            settings=LiveSettings(loaded, {name: self.taker(name) for name in ("LOG_LEVEL", "MAX_CONCURRENCY")}),
            token_file=token_file,
            tls=self.tls,
            certificate_file=files[0],
            key_file=files[1],
            tls_profile="intermediate",
        )

    def taker(self, name: str) -> Callable[[Any], None]:
        def take(value: Any) -> None:
            if name == self.refused:
                raise ValueError("not now")
            self.taken.append((name, value))

        return take

    def reload(self) -> list[tuple[str, str]]:
        """What is logged, by level."""
        self.logged.clear()
        done: list[Any] = []
        Deferred.fromCoroutine(self.reloadable.reload(execute)).addBoth(done.append)
        assert done == [None]
        return self.logged

    def log(self, event: dict[str, Any]) -> None:
        self.logged.append((event["log_level"].name, event["log_format"].format(**event)))
        self.taken.append(("logged", event["log_level"].name))

    def in_the_log(self, level: str) -> list[str]:
        return [text for found, text in self.logged if found == level]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    found = Running(tmp_path)
    globalLogPublisher.addObserver(found.log)
    yield found
    globalLogPublisher.removeObserver(found.log)


def settings_only(running: Running) -> list[Any]:
    return [taken for taken in running.taken if taken[0] != "logged"]


def test_changes_take_effect_and_are_told_in_one_line(running: Running) -> None:
    running.start()
    running.env_file.write_text("LOG_LEVEL=debug\nMAX_CONCURRENCY=4\n")
    assert running.reload()[0] == ("info", "settings read: MAX_CONCURRENCY is 4, LOG_LEVEL is DEBUG")
    assert settings_only(running) == [("MAX_CONCURRENCY", 4), ("LOG_LEVEL", "DEBUG")]
    assert running.reload()[0] == ("info", "settings read: nothing that can take effect has changed")
    assert len(settings_only(running)) == 2
    running.env_file.write_text("")
    assert running.reload()[0] == ("info", "settings read: MAX_CONCURRENCY is not set, LOG_LEVEL is INFO")
    assert settings_only(running)[2:] == [("MAX_CONCURRENCY", None), ("LOG_LEVEL", "INFO")]


@pytest.mark.parametrize(
    ("before", "after", "order"),
    [("INFO", "DEBUG", ["LOG_LEVEL", "logged"]), ("INFO", "ERROR", ["logged", "LOG_LEVEL"])],
)
def test_the_line_is_logged_while_it_can_be_seen(running: Running, before: str, after: str, order: list[str]) -> None:
    """Whether the new level lets it through, or only the old."""
    running.env_file.write_text(f"LOG_LEVEL={before}\n")
    running.start()
    running.env_file.write_text(f"LOG_LEVEL={after}\n")
    running.reload()
    assert [name for name, _ in running.taken][:2] == order


@pytest.mark.parametrize(
    "text", ["LOG_LEVEL=DEBUG\nMAX_CONCURRENCY=0\nTLS_PORT=x\n", "LOG_LEVEL=DEBUG\n= what\n=\n", None]
)
def test_what_is_broken_keeps_all_settings(running: Running, text: str | None) -> None:
    """One line for each problem. Tokens and certificate are read all the same."""
    running.start()
    before = running.tls.context
    if text is None:
        running.env_file.unlink()
    else:
        running.env_file.write_text(text)
    running.reload()
    assert len(running.in_the_log("error")) == (1 if text is None else 2)
    assert all(line.startswith("the settings read last stay in force: ") for line in running.in_the_log("error"))
    assert settings_only(running) == []
    assert [line.split()[0] for line in running.in_the_log("info")] == ["token", "certificate"]
    assert running.tls.context is not before
    running.env_file.write_text("MAX_CONCURRENCY=5\n")
    running.reload()
    assert settings_only(running) == [("MAX_CONCURRENCY", 5)]


def test_a_value_that_can_t_be_taken_stays_as_it_was(running: Running) -> None:
    running.start()
    running.refused = "MAX_CONCURRENCY"
    running.env_file.write_text("LOG_LEVEL=ERROR\nMAX_CONCURRENCY=3\n")
    running.reload()
    assert running.in_the_log("error") == ["MAX_CONCURRENCY: the value read last stays in force: not now"]
    assert settings_only(running) == [("LOG_LEVEL", "ERROR")]
    running.refused = None
    running.reload()
    assert settings_only(running)[1:] == [("MAX_CONCURRENCY", 3)]


def test_what_the_environment_overrides_is_warned_of(running: Running) -> None:
    running.environ["LOG_LEVEL"] = "INFO"
    running.start()
    running.environ["MAX_CONCURRENCY"] = "9"  # too late
    running.env_file.write_text("LOG_LEVEL=DEBUG\nMAX_CONCURRENCY=3\n")
    running.reload()
    assert running.in_the_log("warn") == [
        f"LOG_LEVEL: the environment has INFO, which overrides DEBUG in {running.env_file}"
    ]
    assert settings_only(running) == [("MAX_CONCURRENCY", 3)]


def test_what_needs_a_restart_is_warned_of(running: Running) -> None:
    """Until it is no longer so, and without its value."""
    running.env_file.write_text("TLS_PORT=1\n")
    running.start()
    running.env_file.write_text("TLS_PORT=1\nQUEUE_LIMIT=7\nKOBOLDCPP_PASSWORD=sesame\n")
    for _ in range(2):
        running.reload()
        assert running.in_the_log("warn") == [
            f"{name}: the new value ({running.env_file}) takes effect with a restart"
            for name in ("KOBOLDCPP_PASSWORD", "QUEUE_LIMIT")
        ]
    running.env_file.write_text("")
    running.reload()
    assert running.in_the_log("warn") == ["TLS_PORT: the new value (default) takes effect with a restart"]
    assert settings_only(running) == []


def test_new_names_that_nobody_knows_are_warned_of(running: Running) -> None:
    running.env_file.write_text("KOBOLDCPP_PASWORD=x\n")
    running.start()
    running.env_file.write_text("KOBOLDCPP_PASWORD=x\nRATE_LIMIT_REQUEST=5\n")
    running.reload()
    assert running.in_the_log("warn") == ["RATE_LIMIT_REQUEST: unknown variable; did you mean RATE_LIMIT_REQUESTS?"]


def test_each_part_is_on_its_own(running: Running) -> None:
    running.start()
    before = running.tls.context
    running.env_file.write_text("MAX_CONCURRENCY=2\n")
    running.tokens.write_text("\n")
    running.certificate.write_text("broken")
    running.reload()
    assert [line.partition(":")[0] for line in running.in_the_log("error")] == [
        f"token file {running.tokens} can't be used, the tokens read last stay in force",
        "the certificate read last stays in force",
    ]
    assert settings_only(running) == [("MAX_CONCURRENCY", 2)]
    assert running.tls.context is before


def test_one_reload_at_a_time(running: Running) -> None:
    """A second signal waits for the first, or what is older could come to be in force later."""
    running.start()
    waiting: list[tuple[Deferred[Any], Callable[[], Any]]] = []

    def in_thread(call: Callable[[], Any]) -> Deferred[Any]:
        waiting.append((Deferred(), call))
        return waiting[-1][0]

    reloads = [Deferred.fromCoroutine(running.reloadable.reload(in_thread)) for _ in range(2)]
    for expected in ([True, False], [True, True]):
        for _ in range(4):  # settings, the token file's time and content, certificate
            assert len(waiting) == 1
            answer, call = waiting.pop()
            answer.callback(call())
        assert [reload.called for reload in reloads] == expected


def test_warnings_are_of_the_certificate_in_force(running: Running) -> None:
    running.start()
    expires = running.tls.expires
    [warning] = running.reloadable.certificate_warnings(expires - 100)
    assert warning.startswith(f"TLS_CERT_FILE='{running.certificate}': the certificate expires on ")
    running.certificate.write_text("broken")
    running.reload()
    assert running.reloadable.certificate_warnings(expires - 100) == [warning]
    running.issue()
    running.reload()
    assert running.reloadable.certificate_warnings(running.tls.expires - 30 * 86_400) == []
