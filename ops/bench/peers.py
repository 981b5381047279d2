"""What is measured: AI Ticket, and what people use or could write instead. How each is installed, started and asked."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import wire
from processes import (
    CERTIFICATE,
    HERE,
    KEY,
    TELEMETRY_OFF,
    NotStarted,
    Running,
    Target,
    environment,
    free_port,
    make_certificate,
    start_ai_ticket,
    telemetry_on,
)

CHAT = "/v1/chat/completions"
GATHER = "/gather" + CHAT
EVENT = "/event"
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@dataclass(frozen=True)
class Row:
    """A way of asking a peer: one line of a table.

    `path` for one answer; `asks_stream`: one answer comes as a stream too, which the caller puts together. `settings`
    are for the peer's own environment.
    """

    name: str
    peer: str
    path: str = CHAT
    asks_stream: bool = False
    settings: tuple[tuple[str, str], ...] = ()

    def request(self, order: wire.Order, stream: bool, keep: bool) -> bytes:
        """What a caller sends."""
        if self.path == EVENT:
            return wire.request(EVENT, wire.event_body(order, stream), keep)
        stream_path = CHAT if stream else self.path
        return wire.request(stream_path, wire.chat_body(order, stream or self.asks_stream), keep)


NOT_READ = ", stream not read"

DIRECT = Row("model server itself", "backend", asks_stream=True)
AI_TICKET = Row("AI Ticket", "ai-ticket", EVENT)
AI_TICKET_CHAT = Row("AI Ticket, " + CHAT, "ai-ticket")
BASE = Row("aiohttp", "aiohttp", GATHER)
QUIET = Row("AI Ticket, telemetry off", "ai-ticket", EVENT, settings=tuple(TELEMETRY_OFF.items()))
TWO_WORKERS = Row("AI Ticket, 2 workers", "ai-ticket", EVENT, settings=(("WORKERS", "2"),))

ANSWER_ROWS = (
    DIRECT,
    AI_TICKET,
    AI_TICKET_CHAT,
    BASE,
    Row("aiohttp" + NOT_READ, "aiohttp"),
    Row("FastAPI + httpx", "fastapi", GATHER),
    Row("FastAPI + httpx" + NOT_READ, "fastapi"),
    Row("LiteLLM", "litellm", asks_stream=True),
    Row("LiteLLM" + NOT_READ, "litellm"),
    Row("nginx", "nginx", asks_stream=True),
    Row("nginx" + NOT_READ, "nginx"),
)
"""The first row of each peer has it read the model server's stream, as AI Ticket does: the others put the answer
together, LiteLLM and nginx can only hand the stream on. The second has it ask for the answer in one piece."""

STREAM_ROWS = tuple(row for row in ANSWER_ROWS if not row.name.endswith(NOT_READ))

REQUIREMENTS = {
    "aiohttp": ["aiohttp>=3.14"],
    "fastapi": ["fastapi>=0.165", "httpx>=0.28", "uvicorn[standard]>=0.54"],
    "litellm": ["litellm[proxy]>=1.106"],
}
PEERS = ("ai-ticket", *REQUIREMENTS, "nginx")

LITELLM = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOG": "ERROR",
    "LITELLM_MASTER_KEY": "bench",
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
}
NGINX_CONF = """
daemon off; worker_processes 1; pid nginx.pid; error_log stderr; worker_rlimit_nofile 16384;
events {{ worker_connections 8192; }}
http {{
  access_log off; client_max_body_size 2m; client_body_buffer_size 1m; keepalive_requests 100000000;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
  upstream model {{ server 127.0.0.1:{backend}; keepalive 64; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} {tls} backlog=4096;
    location /health {{ return 200 "ok"; }}
    location / {{
      proxy_pass http://model; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}
"""


def _install(peer: str, environments: Path) -> Path:
    """The interpreter of a peer's own environment, which is made if it is not there.

    @raise NotStarted: it can't be.
    """
    home = environments / peer
    python, made = home / "bin" / "python", home / "made-by-bench"
    wanted = "\n".join(REQUIREMENTS[peer])
    if made.exists() and made.read_text() == wanted:
        return python
    print(f"installing {peer} into an environment of its own", file=sys.stderr)
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True, capture_output=True)  # noqa: S603
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS[peer]]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=1200)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise NotStarted("installing took too long") from None
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines()
        raise NotStarted(lines[-1] if lines else "installing failed") from None
    made.write_text(wanted)
    return python


@dataclass
class Stage:
    """The peers that run: each is started when it is first asked for, and kept."""

    environments: Path
    folder: Path
    collector: int
    """The port of one."""
    missing: dict[str, str] = field(default_factory=dict)
    _running: dict[object, Running] = field(default_factory=dict)

    def get(self, row: Row, backend: int, tls: bool, settings: tuple[tuple[str, str], ...] = ()) -> Target | None:
        """The row's peer before this model server, or None where there is none; `missing` then says why."""
        key = (row.peer, backend, tls, row.settings, settings)
        why = f"{row.name}{' over TLS' if tls else ''}"
        if key not in self._running and why not in self.missing:
            folder = self.folder / f"{len(self._running)}-{row.peer}"
            folder.mkdir(exist_ok=True)
            try:
                self._running[key] = self._start(row, backend, tls, folder, dict(settings + row.settings))
            except (NotStarted, OSError) as error:
                self.missing[why] = str(error)
                print(f"left out: {why}: {error}", file=sys.stderr)
        return self._running[key].target if key in self._running else None

    def clear(self) -> None:
        """Stop all that run."""
        for running in self._running.values():
            running.stop()
        self._running.clear()

    def _start(self, row: Row, backend: int, tls: bool, folder: Path, settings: dict[str, str]) -> Running:
        if row.peer == "ai-ticket":
            _check_workers(settings)
            url = f"http://127.0.0.1:{backend}"
            return start_ai_ticket(folder, url, {**telemetry_on(self.collector), **settings}, tls=tls)
        make_certificate(folder)
        command = COMMANDS[row.peer](self.environments, folder, backend, port := free_port(), tls)
        environ = environment(LITELLM)
        ready = "/health/liveliness" if row.peer == "litellm" else "/health"
        return Running(command, folder=folder, environ=environ, port=port, ready=ready, tls=tls, patience=120.0)


def _check_workers(settings: dict[str, str]) -> None:
    """Raise NotStarted where the daemon does not know worker processes, and would take no notice."""
    from ai_ticket.settings import Settings  # noqa: PLC0415

    if "WORKERS" in settings and "workers" not in Settings.__struct_fields__:
        raise NotStarted("it has no setting WORKERS")


Command = Callable[[Path, Path, int, int, bool], list[str | Path]]


def _bare(peer: str) -> Command:
    def command(environments: Path, folder: Path, backend: int, port: int, tls: bool) -> list[str | Path]:
        script = HERE / "bare" / f"{peer}_proxy.py"
        return [_install(peer, environments), script, str(backend), str(port), *([CERTIFICATE, KEY] if tls else [])]

    return command


def _litellm(environments: Path, folder: Path, backend: int, port: int, tls: bool) -> list[str | Path]:
    python = _install("litellm", environments)
    model = {"model": "openai/bench", "api_base": f"http://127.0.0.1:{backend}/v1", "api_key": "none"}
    config = {"model_list": [{"model_name": "bench", "litellm_params": model}]}
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    files: list[str | Path] = ["--ssl_certfile_path", CERTIFICATE, "--ssl_keyfile_path", KEY] if tls else []
    begin = [python, "-c", "from litellm import run_server; run_server()", "--config", "config.yaml"]
    return [*begin, "--host", "127.0.0.1", "--port", str(port), "--telemetry", "False", *files]


def _nginx(environments: Path, folder: Path, backend: int, port: int, tls: bool) -> list[str | Path]:
    if NGINX is None:
        raise NotStarted("it is not installed (Debian: nginx-light)")
    secure = "ssl" if tls else ""
    conf = NGINX_CONF.format(backend=backend, port=port, tls=secure)
    if tls:
        conf = conf.replace(
            "location /health", f"ssl_certificate {CERTIFICATE}; ssl_certificate_key {KEY};\n    location /health"
        )
    (folder / "nginx.conf").write_text(conf)
    return [NGINX, "-p", folder, "-c", "nginx.conf", "-e", "stderr"]


COMMANDS: dict[str, Command] = {
    "aiohttp": _bare("aiohttp"),
    "fastapi": _bare("fastapi"),
    "litellm": _litellm,
    "nginx": _nginx,
}


def versions(environments: Path, peers: tuple[str, ...]) -> dict[str, str]:
    """What is measured, and what it is made of."""
    script = (
        "import importlib.metadata as m, json, platform, sys\n"
        "found = {'python': platform.python_version()}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    asked = {
        "aiohttp": ["aiohttp"],
        "fastapi": ["fastapi", "httpx", "uvicorn"],
        "litellm": ["litellm"],
        "ai-ticket": ["twisted", "treq", "httptools", "msgspec", "uvloop"],
    }
    found: dict[str, str] = {}
    for peer in peers:
        python = Path(sys.executable) if peer == "ai-ticket" else environments / peer / "bin" / "python"
        if peer in asked and python.exists():
            said = subprocess.run([python, "-c", script, *asked[peer]], capture_output=True, text=True, check=False)  # noqa: S603
            found |= json.loads(said.stdout) if said.returncode == 0 else {}
    if "nginx" in peers and NGINX is not None:
        said = subprocess.run([NGINX, "-v"], capture_output=True, text=True, check=False)  # noqa: S603
        found["nginx"] = said.stderr.rpartition("/")[2].strip()
    return found
