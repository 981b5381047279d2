"""`ops/bootstrap.sh`, as far as it can be shown in a moment and without a network: what it makes, what it says."""

import os
import shutil
import ssl
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "ops" / "bootstrap.sh"
NEEDED = ["bash", "cat", "chmod", "dirname", "head", "mkdir", "mv", "rm", "uname"]

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout that has no more than the scripts, in a path with a space."""
    root = tmp_path / "a checkout"
    (root / "ops").mkdir(parents=True)
    for script in (SCRIPT, SCRIPT.with_name("make-cert.sh")):
        shutil.copy(script, root / "ops")
    return root


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder for PATH that has the tools of a bare machine: no Python, no openssl."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in NEEDED:
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    return folder


def bootstrap(checkout: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": path or os.environ["PATH"]}
    command = [str(checkout / "ops" / "bootstrap.sh"), *arguments]
    return subprocess.run(command, env=environ, cwd="/", capture_output=True, text=True, timeout=60, check=False)


def function(checkout: Path, call: str, **environ: str) -> str:
    """Call a function of the script, the umask as open as it gets, and give what it prints."""
    script = f'umask 000; source "{checkout}/ops/bootstrap.sh"; {call}'
    environ = {"PATH": os.environ["PATH"], **environ}
    done = subprocess.run(["bash", "-c", script], env=environ, cwd="/", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def pretend_python(tools: Path, *, version: str = "3.13", on_ensurepip: str = "exit 0") -> None:
    """Put a `python3` on the path that has this version, and like Debian's bare one can't make environments."""
    fake = tools / "python3"
    fake.write_text(
        f"""#!{tools}/bash
        case "$*" in
        *print*) echo {version} ;;
        *'< (3, 11)'*) [[ {version} != 3.9 ]] ;;
        *ensurepip*) {on_ensurepip} ;;
        *'-m venv'*) mkdir -p "${{@: -1}}/bin"; echo 'ensurepip is not available'; exit 1 ;;
        esac
        """
    )
    fake.chmod(0o755)


def test_help_says_how_to_use_it(checkout: Path) -> None:
    done = bootstrap(checkout, "--help")

    assert done.returncode == 0
    assert all(option in done.stdout for option in ("--run", "--test", "--no-local"))


def test_an_unknown_argument_is_refused_before_anything_is_made(checkout: Path) -> None:
    done = bootstrap(checkout, "--rum")

    assert done.returncode == 1
    assert "unknown argument: --rum" in done.stderr
    assert [path.name for path in checkout.iterdir()] == ["ops"]


class TestMissing:
    """What a bare machine lacks is named, with the command that brings it."""

    def test_openssl(self, checkout: Path, tools: Path) -> None:
        pretend_python(tools)

        done = bootstrap(checkout, path=str(tools))

        assert done.returncode == 1
        assert "apt install openssl" in done.stderr

    def test_python(self, checkout: Path, tools: Path) -> None:
        done = bootstrap(checkout, "--test", path=str(tools))

        assert done.returncode == 1
        assert "Python 3.11 or newer is needed" in done.stderr
        assert "found: none" in done.stderr

    def test_a_recent_python(self, checkout: Path, tools: Path) -> None:
        pretend_python(tools, version="3.9")

        done = bootstrap(checkout, "--test", path=str(tools))

        assert done.returncode == 1
        assert "found: python3 (3.9)" in done.stderr

    def test_ensurepip(self, checkout: Path, tools: Path) -> None:
        pretend_python(tools, on_ensurepip="exit 1")

        done = bootstrap(checkout, "--test", path=str(tools))

        assert done.returncode == 1
        assert "apt install python3-venv" in done.stderr

    def test_what_only_making_the_environment_shows(self, checkout: Path, tools: Path) -> None:
        """Then the reason is passed on, and no half-made environment stays behind."""
        pretend_python(tools)

        done = bootstrap(checkout, "--test", path=str(tools))

        assert done.returncode == 1
        assert "ensurepip is not available" in done.stderr
        assert "apt install python3-venv" in done.stderr
        assert not (checkout / ".venv").exists()


@needs_openssl
class TestCertificate:
    """The self-signed certificate."""

    def test_is_its_own_root_for_this_machine(self, checkout: Path) -> None:
        function(checkout, "make_certificate")

        crt, key = checkout / "ops/certs/server.crt", checkout / "ops/certs/server.key"
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(crt, key)
        for name in ("localhost", "127.0.0.1", "::1", os.uname().nodename):
            client = ssl.create_default_context(cafile=str(crt))
            client.verify_flags |= ssl.VERIFY_X509_STRICT
            shake_hands(server, client, name)

    def test_only_the_owner_can_read_the_key(self, checkout: Path) -> None:
        function(checkout, "make_certificate")

        key = checkout / "ops/certs/server.key"
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert sorted(path.name for path in key.parent.iterdir()) == ["server.crt", "server.key"]

    def test_is_never_overwritten(self, checkout: Path) -> None:
        certs = checkout / "ops/certs"
        certs.mkdir()
        (certs / "server.crt").write_text("mine")
        (certs / "server.key").write_text("mine")

        function(checkout, "make_certificate")

        assert {path.read_text() for path in certs.iterdir()} == {"mine"}

    def test_a_key_that_is_there_is_used(self, checkout: Path) -> None:
        function(checkout, "make_certificate")
        crt, key = checkout / "ops/certs/server.crt", checkout / "ops/certs/server.key"
        crt.unlink()
        before = key.read_bytes()

        function(checkout, "make_certificate")

        assert key.read_bytes() == before
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(crt, key)


def shake_hands(server_context: ssl.SSLContext, client_context: ssl.SSLContext, name: str) -> None:
    """Raise `ssl.SSLError` unless a client that calls the server by this name trusts it."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server, server_hostname=name)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    for end in (client, server, client):
        with suppress(ssl.SSLWantReadError):
            end.do_handshake()
    assert client.version() is not None


class TestToken:
    """The random token. `$python` of the script is the environment's; here it is the one that runs the tests."""

    def make(self, checkout: Path) -> Path:
        function(checkout, f'python="{sys.executable}"; make_token')
        return checkout / "ops/secrets/ai_ticket_auth_token.txt"

    def test_is_one_line_that_only_the_owner_can_read(self, checkout: Path) -> None:
        file = self.make(checkout)

        assert len(file.read_text().strip()) >= 32
        assert len(file.read_text().split()) == 1
        assert stat.S_IMODE(file.stat().st_mode) == 0o600

    def test_is_never_overwritten(self, checkout: Path) -> None:
        file = self.make(checkout)
        before = file.read_text()

        self.make(checkout)

        assert file.read_text() == before


class TestEnv:
    """The `.env` file."""

    def test_is_made_once_for_the_owner_alone(self, checkout: Path) -> None:
        function(checkout, "make_env KOBOLDCPP_API_URL=local:; make_env KOBOLDCPP_API_URL=http://other")

        env = checkout / ".env"
        assert "KOBOLDCPP_API_URL=local:\n" in env.read_text()
        assert "AI_TICKET_AUTH_TOKEN_FILE=ops/secrets/ai_ticket_auth_token.txt\n" in env.read_text()
        assert stat.S_IMODE(env.stat().st_mode) == 0o600

    def test_one_of_somebody_else_gets_what_it_lacks(self, checkout: Path) -> None:
        (checkout / ".env").write_text("TLS_PORT=18443")
        function(checkout, "make_env KOBOLDCPP_API_URL=local:; make_env KOBOLDCPP_API_URL=local:")
        assert (checkout / ".env").read_text() == (
            "TLS_PORT=18443\nAI_TICKET_AUTH_TOKEN_FILE=ops/secrets/ai_ticket_auth_token.txt\nKOBOLDCPP_API_URL=local:\n"
        )

    def test_one_that_lacks_nothing_stays_as_it_is(self, checkout: Path) -> None:
        text = "export AI_TICKET_AUTH_TOKEN=x\nKOBOLDCPP_API_URL=http://gpu:5001\n"
        (checkout / ".env").write_text(text)
        function(checkout, "make_env KOBOLDCPP_API_URL=local:")
        assert (checkout / ".env").read_text() == text


class TestCurlLine:
    """The command that `--run` prints."""

    def curl_arguments(self, checkout: Path, tokens: str) -> list[str]:
        """What curl is given when the command is pasted in another folder."""
        (checkout / "ops/secrets").mkdir()
        (checkout / "ops/secrets/tokens.txt").write_text(tokens)
        given = "settings() { printf 'True\\nops/secrets/tokens.txt\\n'; };"
        line = function(checkout, f'{given} curl_line localhost 8443 --cacert "$checkout/ops/certs/server.crt"')
        assert "!" not in line, "an interactive shell reads it as history"
        pasted = ["bash", "-c", f"curl() {{ printf '%s\\n' \"$@\"; }}; {line}"]
        return subprocess.run(pasted, cwd="/", capture_output=True, text=True, check=True).stdout.splitlines()

    def test_finds_certificate_and_token_from_any_folder(self, checkout: Path) -> None:
        arguments = self.curl_arguments(checkout, "s3cret\n")

        assert arguments[:2] == ["--cacert", str(checkout / "ops/certs/server.crt")]
        assert "Authorization: Bearer s3cret" in arguments
        assert arguments[-1] == "https://localhost:8443/event"

    def test_takes_the_first_token_that_is_there_as_itself(self, checkout: Path) -> None:
        tokens = "# a comment\n\n  # another\nbob sha256:" + "0" * 64 + "\nalice s3cret\ncarol other\n"

        assert "Authorization: Bearer s3cret" in self.curl_arguments(checkout, tokens)
