"""The units and their installer, as far as it can be shown without a systemd that runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from ai_ticket.environment import ENV_FILE
from ai_ticket.settings import DEFAULTS, variables
from ai_ticket.systemd import MARGIN_SECONDS

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "etc" / "systemd"
SERVICE = UNITS / "ai-ticket.service"
SOCKETS = sorted(UNITS.glob("*.socket"))
INSTALLER = ROOT / "ops" / "install-systemd.sh"

needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (Debian: systemd)"
)


def directives(unit: Path) -> dict[str, list[str]]:
    """The values of each directive of a unit, in their order."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().replace("\\\n", " ").splitlines():
        name, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            found.setdefault(name, []).append(" ".join(value.split()))
    return found


SERVICE_SAYS = directives(SERVICE)


def environment() -> dict[str, str]:
    return dict(value.split("=", 1) for value in SERVICE_SAYS["Environment"])


class TestService:
    def test_sets_only_variables_that_there_are(self) -> None:
        assert environment().keys() <= {*variables(), ENV_FILE, "XDG_CACHE_HOME"}

    def test_stopping_may_take_as_long_as_it_does(self) -> None:
        seconds = DEFAULTS.shutdown_delay_seconds + DEFAULTS.shutdown_grace_seconds + MARGIN_SECONDS
        assert int(*SERVICE_SAYS["TimeoutStopSec"]) >= seconds

    def test_tells_systemd_of_itself_and_leaves_no_file(self) -> None:
        assert SERVICE_SAYS["Type"] == ["notify"]
        assert SERVICE_SAYS["NotifyAccess"] == ["main"]
        assert int(*SERVICE_SAYS["WatchdogSec"]) > 0
        assert shlex.split(*SERVICE_SAYS["ExecStart"])[1:] == ["--nodaemon", "--pidfile=", "ai-ticket"]

    def test_a_stop_leaves_the_model_server_to_the_daemon(self) -> None:
        """Or a generation would be cut by the signal that the child gets as well."""
        assert SERVICE_SAYS["KillMode"] == ["mixed"]

    def test_each_credential_is_copied_at_the_start_and_named_to_the_daemon(self) -> None:
        credentials = dict(value.split(":") for value in SERVICE_SAYS["LoadCredential"])
        copied = shlex.split(*SERVICE_SAYS["ExecStartPre"])
        assert [word for word in copied if word.startswith("%d/")] == [f"%d/{name}" for name in credentials]
        named = {value for name, value in environment().items() if name != "XDG_CACHE_HOME"}
        assert named == {f"%t/ai-ticket/{name}" for name in credentials}
        for name, path in credentials.items():
            assert Path(path).name == name

    def test_a_reload_copies_the_same_files_first(self) -> None:
        copy, signal = SERVICE_SAYS["ExecReload"]
        assert signal == "/bin/kill -HUP $MAINPID"
        assert copy.startswith("+/bin/bash -o pipefail -c '")
        words = copy.partition("|")[0].split()
        folder, found = Path("/"), set()
        for before, word in pairwise(words):
            if before == "-C":
                folder = Path(os.path.normpath(folder / word))
            elif re.fullmatch(r"\w[\w-]*\.\w+", word):
                found.add(str(folder / word))
        assert found == {value.partition(":")[2] for value in SERVICE_SAYS["LoadCredential"]}

    @needs_analyze
    def test_verify_is_silent(self, tmp_path: Path) -> None:
        program = tmp_path / "twistd"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        for unit in UNITS.iterdir():
            text = unit.read_text().replace("/opt/ai-ticket/current/bin/twistd", str(program))
            (tmp_path / unit.name).write_text(text)
        units = [str(tmp_path / unit.name) for unit in UNITS.iterdir()]
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    @needs_analyze
    def test_exposure_is_low(self) -> None:
        command = ["systemd-analyze", "security", "--no-pager", "--offline=true", str(SERVICE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "offline" in done.stderr:
            pytest.skip("this systemd-analyze can't look at a unit offline (250 and newer can)")
        found = re.search(r"Overall exposure level for ai-ticket.service: ([0-9.]+)", done.stdout)
        assert found is not None, done.stderr
        assert float(found[1]) <= 1.5


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can hand files to another user")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed (Debian: util-linux)")
class TestReload:
    """The command that brings the service's copies up to date, with folders of the test in the place of the real."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        source = tmp_path / "etc"
        for name in ("ai-ticket.env", "secrets/ai_ticket_auth_token.txt", "certs/server.crt", "certs/server.key"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_text(name)
            (source / name).chmod(0o600)
        return source

    @pytest.fixture
    def copies(self, tmp_path: Path) -> Path:
        for folder in tmp_path.parents:
            if folder.stat().st_mode & 0o001 == 0 and folder.stat().st_uid == 0:
                folder.chmod(0o711)  # pytest's own folders are for root alone
        tmp_path.chmod(0o711)
        copies = tmp_path / "run" / "ai-ticket"
        copies.mkdir(parents=True, mode=0o700)
        os.chown(copies, 12345, 12345)
        return copies

    def reload(self, source: Path, copies: Path) -> int:
        command = SERVICE_SAYS["ExecReload"][0].removeprefix("+")
        for old, new in (("/etc/ai-ticket", str(source)), ("%t/ai-ticket", str(copies)), ("%%", "%")):
            command = command.replace(old, new)
        return subprocess.run(shlex.split(command), check=False, umask=0o077, stderr=subprocess.DEVNULL).returncode

    def test_gives_them_to_the_service_alone(self, source: Path, copies: Path) -> None:
        assert self.reload(source, copies) == 0
        files = {path.name: path for path in copies.iterdir()}
        assert files.keys() == {"ai-ticket.env", "ai_ticket_auth_token.txt", "server.crt", "server.key"}
        for path in files.values():
            status = path.stat()
            assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (12345, 12345, 0o600)

    def test_follows_links_of_the_operator_and_none_of_the_service(self, source: Path, copies: Path) -> None:
        """certbot's files are links. One in the service's folder could lead root to write anywhere."""
        renewed = source / "renewed.pem"
        renewed.write_text("renewed")
        (source / "certs/server.crt").unlink()
        (source / "certs/server.crt").symlink_to(renewed)
        precious = source / "precious"
        precious.write_text("precious")
        (copies / "server.crt").symlink_to(precious)

        assert self.reload(source, copies) == 0

        assert (copies / "server.crt").read_text() == "renewed"
        assert not (copies / "server.crt").is_symlink()
        assert precious.read_text() == "precious"

    def test_fails_where_a_file_is_missing(self, source: Path, copies: Path) -> None:
        """systemd then sends no signal, and says that the reload failed."""
        (source / "secrets/ai_ticket_auth_token.txt").unlink()
        assert self.reload(source, copies) != 0


class TestSockets:
    @pytest.mark.parametrize("unit", SOCKETS, ids=lambda unit: unit.name)
    def test_have_names_that_the_daemon_knows(self, unit: Path) -> None:
        said = directives(unit)
        assert said["FileDescriptorName"][0] in ("https", "http", "metrics")
        assert said.get("Service", ["ai-ticket.service"]) == ["ai-ticket.service"]

    def test_the_https_port_is_the_default_one(self) -> None:
        said = directives(UNITS / "ai-ticket.socket")
        assert said["ListenStream"] == [str(DEFAULTS.tls_port)]
        assert said["FileDescriptorName"] == ["https"]

    def test_the_http_port_is_for_this_machine_alone(self) -> None:
        said = directives(UNITS / "ai-ticket-http.socket")
        assert said["ListenStream"][0].startswith("127.0.0.1:")
        assert said["FileDescriptorName"] == ["http"]

    def test_the_service_waits_for_its_socket(self) -> None:
        assert "ai-ticket.socket" in SERVICE_SAYS["Requires"][0]
        assert "ai-ticket.socket" in SERVICE_SAYS["After"][0]


FAKE_PYTHON = """#!/bin/bash
case "$*" in
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
*"-m pip install"* | "-I -c import twisted"*) echo "$*" >>"$PIP_LOG" ;;
*) exec {python} "$@" ;;
esac
"""


class Machine:
    """A folder that stands for a machine, and a Python that makes hollow environments."""

    def __init__(self, folder: Path):
        self.root = folder / "root"
        self._python = folder / "python3"
        self._python.write_text(FAKE_PYTHON.format(python=sys.executable))
        self._python.chmod(0o755)
        self._log = folder / "pip.log"

    def install(self, *arguments: str, checkout: Path = ROOT, ok: bool = True) -> str:
        environ = {"PATH": os.environ["PATH"], "PYTHON": str(self._python), "PIP_LOG": str(self._log)}
        command = [str(checkout / "ops/install-systemd.sh"), "--root", str(self.root), *arguments]
        done = subprocess.run(command, env=environ, cwd="/", capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode == 0) == ok, done.stderr
        return done.stdout + done.stderr

    @property
    def files(self) -> dict[str, int]:
        """All files, links and their times."""
        return {str(path.relative_to(self.root)): path.lstat().st_mtime_ns for path in self.root.rglob("*")}

    def link(self, name: str) -> str:
        return os.readlink(self.root / "opt/ai-ticket" / name)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def changed_checkout(folder: Path) -> Path:
    """A checkout whose sources differ from this one's."""
    checkout = folder / "changed"
    for name in ("ops", "etc", "twisted", "setup.py", "pyproject.toml", "README.md"):
        checkout.mkdir(exist_ok=True)
        (checkout / name).symlink_to(ROOT / name)
    (checkout / "ops").unlink()
    (checkout / "ops").mkdir()
    for script in ROOT.glob("ops/*.sh"):
        shutil.copy(script, checkout / "ops")
    (checkout / "ai_ticket").mkdir()
    (checkout / "ai_ticket/__init__.py").write_text('__version__ = "9.9.9"\n')
    return checkout


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate and a token with openssl")
class TestInstaller:
    def test_puts_everything_where_the_units_look_for_it(self, machine: Machine) -> None:
        machine.install()

        for value in SERVICE_SAYS["LoadCredential"]:
            path = machine.root / value.partition(":")[2].lstrip("/")
            assert path.is_file(), value
            assert path.stat().st_mode & 0o077 == (0o044 if path.name == "server.crt" else 0), value
        program = Path(SERVICE_SAYS["ExecStart"][0].split()[0])
        assert (machine.root / str(program.parent).lstrip("/")).is_dir()
        for unit in UNITS.iterdir():
            assert (machine.root / "etc/systemd/system" / unit.name).read_bytes() == unit.read_bytes()

    def test_the_settings_are_the_sample_with_the_paths_of_the_installation(self, machine: Machine) -> None:
        machine.install()

        text = (machine.root / "etc/ai-ticket/ai-ticket.env").read_text()
        assert dict(re.findall(r"^([A-Z_]+)=(.*)$", text, re.MULTILINE)) == {
            "AI_TICKET_AUTH_TOKEN_FILE": "/etc/ai-ticket/secrets/ai_ticket_auth_token.txt",
            "TLS_CERT_FILE": "/etc/ai-ticket/certs/server.crt",
            "TLS_KEY_FILE": "/etc/ai-ticket/certs/server.key",
        }

    def test_a_second_time_changes_nothing(self, machine: Machine) -> None:
        machine.install()
        before = machine.files

        machine.install()

        assert machine.files == before

    def test_what_the_operator_has_changed_is_kept(self, machine: Machine) -> None:
        for name in ("ai-ticket.env", "secrets/ai_ticket_auth_token.txt", "certs/server.crt", "certs/server.key"):
            path = machine.root / "etc/ai-ticket" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("mine")

        machine.install()

        etc = machine.root / "etc/ai-ticket"
        assert {path.read_text() for path in etc.rglob("*") if path.is_file()} == {"mine"}

    def test_a_new_release_lies_beside_the_old_one_which_can_come_back(self, machine: Machine, tmp_path: Path) -> None:
        machine.install()
        first = machine.link("current")
        machine.install(checkout=changed_checkout(tmp_path))
        second = machine.link("current")
        assert second.startswith("releases/9.9.9-")
        assert machine.link("previous") == first

        machine.install("--rollback")
        assert (machine.link("current"), machine.link("previous")) == (first, second)
        machine.install("--rollback")
        assert (machine.link("current"), machine.link("previous")) == (second, first)

    def test_what_one_can_go_back_to_is_kept(self, machine: Machine, tmp_path: Path) -> None:
        machine.install()
        first = machine.link("current")
        checkout = changed_checkout(tmp_path)
        machine.install(checkout=checkout)
        machine.install("--rollback")
        (checkout / "ai_ticket/__init__.py").write_text('__version__ = "9.9.10"\n')
        machine.install(checkout=checkout)

        assert machine.link("previous") == first
        assert machine.link("current").startswith("releases/9.9.10-")
        machine.install("--rollback")
        assert machine.link("current") == first

    def test_an_upgrade_has_the_extras_of_the_release_before(self, machine: Machine, tmp_path: Path) -> None:
        machine.install("--extras", "")
        checkout = changed_checkout(tmp_path)
        assert "with [" not in machine.install(checkout=checkout)
        assert "with [redis]" in machine.install("--extras", "redis", checkout=checkout)
        (checkout / "ai_ticket/__init__.py").write_text('__version__ = "9.9.10"\n')
        assert "with [redis]" in machine.install(checkout=checkout)

    def test_what_was_not_started_is_started_the_next_time(self, machine: Machine, tmp_path: Path) -> None:
        machine.install()
        in_force = machine.root / "opt/ai-ticket/in-force"
        before = in_force.read_text()
        checkout = changed_checkout(tmp_path)
        machine.install("--no-start", checkout=checkout)
        assert in_force.read_text() == before
        machine.install(checkout=checkout)
        assert in_force.read_text().split()[0] == machine.link("current")

    def test_without_a_release_before_there_is_no_way_back(self, machine: Machine) -> None:
        machine.install()
        assert "there is no release before" in machine.install("--rollback", ok=False)

    def test_dry_run_says_what_it_would_do_and_does_nothing(self, machine: Machine) -> None:
        said = machine.install("--dry-run")

        assert not machine.root.exists()
        assert "make-cert.sh" in said
        assert all(unit.name in said for unit in UNITS.iterdir())
        assert "-m venv" in said

    def test_uninstall_undoes_it_but_for_what_is_the_operators(self, machine: Machine) -> None:
        machine.install()
        (machine.root / "etc/systemd/system/other.service").touch()

        machine.install("--uninstall")

        left = {path for path in machine.root.rglob("*") if path.is_file() or path.is_symlink()}
        etc = machine.root / "etc"
        assert {path for path in left if etc / "ai-ticket" not in path.parents} == {
            etc / "systemd/system/other.service"
        }
        assert (etc / "ai-ticket/ai-ticket.env").exists()

    def test_purge_leaves_nothing(self, machine: Machine) -> None:
        machine.install()
        machine.install("--uninstall", "--purge")
        assert not [path for path in machine.root.rglob("*") if path.is_file() or path.is_symlink()]
        machine.install("--uninstall", "--purge")  # nor does it mind

    def test_what_it_does_not_know_is_refused(self, machine: Machine) -> None:
        assert "unknown argument: --unistall" in machine.install("--unistall", ok=False)
        assert "--purge goes with --uninstall" in machine.install("--purge", ok=False)
        assert not machine.root.exists()
