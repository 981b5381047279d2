"""`Dockerfile`, `docker-compose.yml` and what they mount, without an engine; Compose itself looks at it where it is."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ai_ticket.environment import ENV_FILE
from ai_ticket.settings import DEFAULTS, variables
from ai_ticket.systemd import MARGIN_SECONDS

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DAEMON = SERVICES["ai_ticket"]
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
OPTIONAL = {"nginx", "redis", "prometheus", "grafana"}
OF_THE_PLAYBOOK = {
    "KOBOLDCPP_API_URL",
    "LOG_LEVEL",
    "RATE_LIMIT_REQUESTS",
    "RATE_LIMIT_WINDOW_SECONDS",
    "METRICS_NAMESPACE",
    "TLS_PORT",
}


def has_compose() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0


def seconds(duration: str) -> int:
    assert duration.endswith("s")
    return int(duration[:-1])


def mounted(service: dict[str, Any]) -> list[str]:
    """The folders of this checkout that a service sees."""
    return [volume.split(":")[0] for volume in service.get("volumes", []) if volume.startswith(".")]


class TestDaemon:
    def test_is_given_only_variables_that_there_are(self) -> None:
        assert DAEMON["environment"].keys() <= {*variables(), ENV_FILE}

    def test_is_given_those_that_may_be_exported(self) -> None:
        """Without a value Compose passes them on from the shell; a default may stand in its place."""
        for name in OF_THE_PLAYBOOK | {"TRUST_PROXY_COUNT"}:
            value = DAEMON["environment"][name]
            assert value is None or str(value).startswith(f"${{{name}:-"), name

    def test_reads_its_settings_itself(self) -> None:
        assert "env_file" not in DAEMON
        assert ENV_FILE in DAEMON["environment"]

    def test_stopping_may_take_as_long_as_it_does(self) -> None:
        longest = DEFAULTS.shutdown_delay_seconds + DEFAULTS.shutdown_grace_seconds + MARGIN_SECONDS
        assert seconds(DAEMON["stop_grace_period"]) >= longest
        assert seconds(SERVICES["nginx"]["stop_grace_period"]) >= longest

    def test_believes_no_proxy_unless_told_so(self) -> None:
        assert DAEMON["environment"]["TRUST_PROXY_COUNT"] == "${TRUST_PROXY_COUNT:-0}"

    def test_reaches_a_model_server_on_the_host(self) -> None:
        assert DAEMON["extra_hosts"] == ["host.docker.internal:host-gateway"]
        assert "host.docker.internal" in DAEMON["environment"]["KOBOLDCPP_API_URL"]

    def test_publishes_the_port_that_it_listens_on(self) -> None:
        port = "${TLS_PORT:-8443}"
        assert DAEMON["environment"]["TLS_PORT"] == port
        assert DAEMON["ports"][0] == f"${{TLS_PUBLISH:-{port}}}:{port}"
        assert str(DEFAULTS.tls_port) in port

    def test_finds_key_certificate_and_tokens_in_the_folder_that_is_mounted(self) -> None:
        workdir = re.findall(r"^WORKDIR (\S+)$", DOCKERFILE, re.MULTILINE)[-1]
        assert DAEMON["volumes"] == [f".:{workdir}:ro"]
        for name in ("TLS_CERT_FILE", "TLS_KEY_FILE", "AI_TICKET_AUTH_TOKEN_FILE"):
            path = Path(DAEMON["environment"][name])
            assert not path.is_absolute()
            assert (ROOT / path.parent).is_dir(), name


@pytest.mark.parametrize("name", SERVICES)
class TestEachService:
    def test_can_do_little(self, name: str) -> None:
        service = SERVICES[name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service

    def test_is_optional_but_for_the_daemon(self, name: str) -> None:
        assert (name in SERVICES[name].get("profiles", [])) == (name in OPTIONAL)

    def test_has_a_pinned_image_or_is_built_here(self, name: str) -> None:
        service = SERVICES[name]
        assert "build" in service or re.search(r":v?\d+\.\d+\.\d+", service["image"])

    def test_sees_folders_of_this_checkout_and_no_single_file(self, name: str) -> None:
        for path in mounted(SERVICES[name]):
            assert (ROOT / path).is_dir(), path
        for volume in SERVICES[name].get("volumes", []):
            assert volume.endswith(":ro") or volume.split(":")[0] in COMPOSE["volumes"], volume

    def test_rotates_its_log(self, name: str) -> None:
        assert SERVICES[name]["logging"]["options"].keys() == {"max-size", "max-file"}


class TestWhatIsMounted:
    def test_nginx_is_given_the_daemons_address(self) -> None:
        """The command replaces what is there once, by the daemon's name and the plain port of the image."""
        [pattern, address] = re.findall(r"s/(\S+?)/(\S+?)/", SERVICES["nginx"]["command"][2])[0]
        site = (ROOT / "ops/nginx/ai-ticket.conf").read_text()
        assert len(re.findall(pattern, site)) == 1
        [port] = re.findall(r"HTTP_PORT=(\d+)", DOCKERFILE)
        assert address == f"ai_ticket:{port}"

    def test_nginx_writes_only_where_it_can(self) -> None:
        main = (ROOT / "ops/nginx/compose.conf").read_text()
        assert main.count("/tmp/") == 7
        assert "/tmp" in SERVICES["nginx"]["tmpfs"]

    def test_nginx_has_key_and_certificate_where_it_looks_for_them(self) -> None:
        site = (ROOT / "ops/nginx/ai-ticket.conf").read_text()
        targets = [volume.split(":")[1] for volume in SERVICES["nginx"]["volumes"]]
        for path in re.findall(r"ssl_certificate(?:_key)? (\S+);", site):
            assert str(Path(path).parent) in targets

    def test_prometheus_asks_the_daemon_and_has_all_the_rules(self) -> None:
        ours = yaml.safe_load((ROOT / "ops/prometheus/compose.yml").read_text())
        theirs = yaml.safe_load((ROOT / "ops/prometheus/prometheus.yml").read_text())
        [job] = ours["scrape_configs"]
        assert job["static_configs"] == [{"targets": [f"ai_ticket:{DEFAULTS.otel_prometheus_port}"]}]
        job["static_configs"] = theirs["scrape_configs"][0]["static_configs"]
        assert ours == theirs

    def test_grafana_finds_prometheus_and_the_dashboards(self) -> None:
        folder = ROOT / "ops/grafana/provisioning"
        [source] = yaml.safe_load((folder / "datasources/prometheus.yml").read_text())["datasources"]
        assert source["url"] == "http://prometheus:9090"
        [provider] = yaml.safe_load((folder / "dashboards/ai-ticket.yml").read_text())["providers"]
        assert f"./ops/grafana:{provider['options']['path']}:ro" in SERVICES["grafana"]["volumes"]
        assert list((ROOT / "ops/grafana").glob("*.json"))


class TestImage:
    def test_the_base_is_pinned_by_its_digest(self) -> None:
        assert re.search(r"^ARG BASE=python:3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}$", DOCKERFILE, re.MULTILINE)
        assert set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)) == {"${BASE}"}

    def test_runs_as_a_user_who_is_not_root(self) -> None:
        [user] = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
        assert "0" not in user
        assert DAEMON["user"] == f"${{UID:-{user[0]}}}:${{GID:-{user[1]}}}"

    def test_nothing_but_the_sources_gets_into_it(self) -> None:
        """What is copied and what is not ignored are the same, and exist."""
        ignored = (ROOT / ".dockerignore").read_text().splitlines()
        rules = [line for line in ignored if line and not line.startswith("#")]
        assert rules[0] == "*"
        kept = {line[1:] for line in rules if line.startswith("!")}
        copied = {
            name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()
        }
        assert kept == copied
        for name in kept:
            assert (ROOT / name).exists(), name

    def test_its_health_does_not_hang_on_a_model_server(self) -> None:
        """`ai-ticket health` ends with 1 if the service answers and is degraded."""
        [health] = re.findall(r"^HEALTHCHECK .*CMD (.+)$", DOCKERFILE, re.MULTILINE)
        assert "ai-ticket health" in health
        assert "[ $? -eq 1 ]" in health


@pytest.mark.skipif(not has_compose(), reason="docker compose is not installed")
@pytest.mark.parametrize("profile", ["", *sorted(OPTIONAL)])
def test_compose_accepts_it(profile: str) -> None:
    command = ["docker", "compose", "--project-directory", str(ROOT), "-f", str(ROOT / "docker-compose.yml")]
    chosen = ["--profile", profile] if profile else []
    done = subprocess.run([*command, *chosen, "config", "--quiet"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
