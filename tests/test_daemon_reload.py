"""The real daemon, told to read its settings again."""

import os
import signal
from pathlib import Path

import pytest
from daemon import AUTH, ROOT, Daemon, model_server, running, wait_until

pytestmark = pytest.mark.e2e


def test_sighup_reads_settings_where_they_were_at_the_start(tmp_path: Path) -> None:
    """Paths are relative to the folder of the start, though twistd has gone to another."""
    env_file, tokens = tmp_path / ".env", tmp_path / "tokens"
    env_file.write_text("LOG_LEVEL=INFO\n")
    tokens.write_text("bob one\n")
    (tmp_path / "elsewhere").mkdir()
    with (
        model_server() as server,
        running(
            tmp_path,
            *("--rundir", str(tmp_path / "elsewhere"), "-y", str(ROOT / "ai_ticket.tac")),
            KOBOLDCPP_API_URL=server.url,
            AI_TICKET_AUTH_TOKEN_FILE="tokens",
            TLS_CERT_FILE="server.crt",
            TLS_KEY_FILE="server.key",
            TLS_PORT="0",
        ) as daemon,
        daemon.ready().client() as client,
    ):
        assert os.readlink(f"/proc/{daemon.process.pid}/cwd") == str(tmp_path / "elsewhere")

        def status(headers: dict[str, str]) -> int:
            return client.post("/event", json={"content": "x"}, headers=headers).status_code

        def reload(text: str) -> list[str]:
            """What is logged of the settings, once the tokens, which come after them, are in force too."""
            env_file.write_text(text)
            before = len(daemon.lines)
            daemon.signal(signal.SIGHUP)
            wait_until(lambda: _logged_since(daemon, before, "takes effect with a restart"), "the warning")
            wait_until(lambda: status({"X-API-Key": tokens.read_text().split()[-1]}) == 200, "the token")
            return [line["message"] for line in daemon.lines[before:] if "LiveSettings" in line["logger"]]

        assert status({"X-API-Key": "one"}) == status(AUTH) == 200
        tokens.write_text("bob two\n")
        said = reload("LOG_LEVEL=warning\nQUEUE_LIMIT=5\n")
        assert said == [
            f"QUEUE_LIMIT: the new value ({env_file}) takes effect with a restart",
            "settings read: LOG_LEVEL is WARNING",
        ]
        assert status({"X-API-Key": "one"}) == 401
        tokens.write_text("bob three\n")
        said = reload("LOG_LEVEL=INFO\nQUEUE_LIMIT=5\nTLS_PORT=1\n")
        assert said == [
            f"QUEUE_LIMIT: the new value ({env_file}) takes effect with a restart",
            "settings read: LOG_LEVEL is INFO",
        ]


def _logged_since(daemon: Daemon, start: int, text: str) -> bool:
    return any(text in line["message"] for line in daemon.lines[start:])
