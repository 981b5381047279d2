"""`ops/deploy.md` names only what there is, and `ops/make-cert.sh` makes what it says."""

import os
import re
import shutil
import ssl
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from ai_ticket.cli.arguments import parser
from ai_ticket.environment import ENV_FILE, FILE_TWINS
from ai_ticket.settings import variables

ROOT = Path(__file__).parents[2]
DEPLOY = (ROOT / "ops" / "deploy.md").read_text()
CODE = "\n".join(re.findall(r"```bash\n(.*?)```", DEPLOY, re.DOTALL) + re.findall(r"`([^`\n]+)`", DEPLOY))
MAKE_CERT = ROOT / "ops" / "make-cert.sh"

MADE_BY_THE_READER = {"ops/certs/server.crt", "ops/certs/server.key", "ops/secrets/ai_ticket_auth_token.txt"}
OF_OTHERS = {
    *("COMPOSE_PROFILES", "EXTRAS", "UID", "GID", "TLS_PUBLISH"),  # of Compose, and of our file for it
    *("PATH", "PWD", "RENEWED_LINEAGE"),
    *("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
}
COMMANDS_OF_THE_PLAYBOOK = """\
cp ops/secrets/ai_ticket_auth_token.txt.example ops/secrets/ai_ticket_auth_token.txt
echo "super-secure-token" > ops/secrets/ai_ticket_auth_token.txt
openssl req -x509 -nodes -days 365 -newkey rsa:4096 \\
  -keyout ops/certs/server.key \\
  -out ops/certs/server.crt \\
  -subj "/CN=localhost"
docker compose up --build
docker compose down
"""


def test_files_exist() -> None:
    paths = set(re.findall(r"(?<![\w/-])((?:ops|etc)/[\w./-]*\w|CHANGELOG\.md|docker-compose\.yml|setup\.py)", CODE))
    assert {"ops/install-systemd.sh", "ops/nginx/ai-ticket.conf", "etc/ai-ticket.env"} <= paths
    for path in paths - MADE_BY_THE_READER:
        assert (ROOT / path).exists(), path


def test_scripts_can_be_executed() -> None:
    for path in set(re.findall(r"ops/[\w-]+\.sh", CODE)):
        assert os.access(ROOT / path, os.X_OK), path


def test_variables_exist() -> None:
    named = set(re.findall(r"(?<![\w$/.-])([A-Z][A-Z_]{2,})\b(?!-)", CODE))
    known = {*variables(), *FILE_TWINS, ENV_FILE, *OF_OTHERS}
    assert "KOBOLDCPP_API_URL" in named
    assert named - known - {"CHANGELOG", "HUP", "SIGHUP"} == set()


def test_commands_of_ai_ticket_exist() -> None:
    commands = set(re.findall(r"(?:^|[\s`])ai-ticket ([a-z][a-z-]+)", CODE, re.MULTILINE))
    assert {"check-config", "health", "token", "send"} <= commands
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            parser().parse_args([command, "--help"])
        assert ended.value.code == 0, command


@pytest.mark.parametrize("script", ["install-systemd.sh", "make-cert.sh"])
def test_options_of_scripts_exist(script: str) -> None:
    options = set(re.findall(rf"ops/{script}([^\n#]*)", CODE))
    used = {option for line in options for option in re.findall(r"--[a-z-]+", line)}
    said = subprocess.run([ROOT / "ops" / script, "--help"], capture_output=True, text=True, check=True).stdout
    assert used
    for option in used:
        assert option in said, option


def test_profiles_exist() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"].values()
    profiles = {profile for service in services for profile in service.get("profiles", [])}
    assert set(re.findall(r"^\| `(\w+)` \|.*\|.*\|$", DEPLOY, re.MULTILINE)) & profiles == profiles


@pytest.mark.parametrize("line", COMMANDS_OF_THE_PLAYBOOK.splitlines())
def test_has_each_command_of_the_playbook(line: str) -> None:
    assert f"\n{line}\n" in DEPLOY


def test_units_and_paths_of_the_installation_are_those_of_the_unit() -> None:
    service = (ROOT / "etc/systemd/ai-ticket.service").read_text()
    for path in set(re.findall(r"/etc/ai-ticket/(?:ai-ticket\.env|secrets/\w+\.txt|certs/server\.\w+)", DEPLOY)):
        assert path in service, path
    for unit in set(re.findall(r"\bai-ticket[\w-]*\.(?:socket|service)\b", DEPLOY)):
        assert (ROOT / "etc/systemd" / unit).exists(), unit


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
class TestMakeCert:
    def make(self, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
        environ = {"PATH": path or os.environ["PATH"]}
        return subprocess.run(
            [MAKE_CERT, *arguments], env=environ, cwd="/", capture_output=True, text=True, timeout=60, check=False
        )

    def names(self, folder: Path) -> set[str]:
        """Whom a caller may find behind the certificate."""
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(folder / "server.crt", folder / "server.key")
        command = ["openssl", "x509", "-in", str(folder / "server.crt"), "-noout", "-ext", "subjectAltName"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {name.strip() for name in said.splitlines()[1].split(",")}

    def test_names_what_it_is_told(self, tmp_path: Path) -> None:
        done = self.make("--out", str(tmp_path / "a b"), "ai.example.org", "*.example.org", "10.0.0.5", "fd00::7")
        assert done.returncode == 0, done.stderr
        assert self.names(tmp_path / "a b") >= {
            *("DNS:localhost", "IP Address:127.0.0.1", "DNS:ai.example.org", "DNS:*.example.org"),
            *("IP Address:10.0.0.5", "IP Address:FD00:0:0:0:0:0:0:7"),
        }
        assert stat.S_IMODE((tmp_path / "a b/server.key").stat().st_mode) == 0o600
        assert {path.name for path in (tmp_path / "a b").iterdir()} == {"server.crt", "server.key"}

    def test_overwrites_only_when_it_must(self, tmp_path: Path) -> None:
        assert self.make("--out", str(tmp_path)).returncode == 0
        before = [path.read_bytes() for path in sorted(tmp_path.iterdir())]

        again = self.make("--out", str(tmp_path))
        assert again.returncode == 1
        assert "--force" in again.stderr
        assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == before

        assert self.make("--out", str(tmp_path), "--force", "new.example.org").returncode == 0
        assert "DNS:new.example.org" in self.names(tmp_path)
        assert not set(before) & {path.read_bytes() for path in tmp_path.iterdir()}

    def test_a_failure_leaves_what_was_there(self, tmp_path: Path) -> None:
        """As when the disk is full: here openssl makes a key, and then no certificate."""
        certs, tools = tmp_path / "certs", tmp_path / "bin"
        assert self.make("--out", str(certs)).returncode == 0
        before = {path.name: path.read_bytes() for path in certs.iterdir()}
        tools.mkdir()
        fake = tools / "openssl"
        fake.write_text(f'#!/bin/sh\n[ "$1" = req ] && exit 1\nexec {shutil.which("openssl")} "$@"\n')
        fake.chmod(0o755)

        assert self.make("--out", str(certs), "--force", path=f"{tools}:{os.environ['PATH']}").returncode == 1

        assert {path.name: path.read_bytes() for path in certs.iterdir()} == before

    @pytest.mark.parametrize("wrong", [["a,IP:1.2.3.4"], ["a b"], [""], ["--days", "soon"], ["--uot", "x"]])
    def test_what_it_does_not_understand_is_refused(self, tmp_path: Path, wrong: list[str]) -> None:
        assert self.make("--out", str(tmp_path / "none"), *wrong).returncode == 1
        assert not (tmp_path / "none").exists()
