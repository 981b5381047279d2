"""`ai-ticket health` against a service on this machine."""

import json

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet import reactor

from ai_ticket.cli.arguments import parser
from ai_ticket.cli.health import health
from ai_ticket.cli.http import make_client
from ai_ticket.cli.outcome import CommandError
from ai_ticket.cli.service import locate

BACKENDS = {"localhost:5001": {"status": "up", "slots": 2, "ok": True, "model": "m"}, "local": "down"}


@pytest.fixture
def ask(service, cacert, monkeypatch):
    monkeypatch.setenv("AI_TICKET_AUTH_TOKEN", "s3cr3t")

    async def ask(*arguments):
        options = parser().parse_args(["health", "--url", service.url, "--cacert", cacert, *arguments])
        where = locate(options, timeout=10)
        return await health(reactor, make_client(reactor, where), where, as_json=options.json)

    return ask


@pytest.mark.parametrize(
    ("http_status", "status", "exit_status"),
    [(200, "healthy", 0), (200, "degraded", 1), (503, "draining", 1), (503, "healthy", 1)],
)
@ensureDeferred
async def test_statuses(http_status, status, exit_status, service, ask, capsys):
    service.replies(http_status, {"status": status, "shutdown_initiated": False, "backends": BACKENDS})
    assert await ask() == exit_status
    assert capsys.readouterr() == (
        f"status: {status}\nbackend localhost:5001: up slots=2 ok=true model=m\nbackend local: down\n",
        "",
    )
    [request] = service.requests
    assert (request.method, request.uri) == (b"GET", b"/health")
    assert request.getHeader("Authorization") is None


@ensureDeferred
async def test_json(service, ask, capsys):
    fields = {"status": "degraded", "shutdown_initiated": False, "backends": BACKENDS}
    service.replies(200, fields)
    assert await ask("--json") == 1
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    assert json.loads(captured.out) == fields


@pytest.mark.parametrize("fields", [{}, {"status": None}, {"status": 1}])
@ensureDeferred
async def test_an_answer_that_is_not_about_health(fields, service, ask, capsys):
    service.replies(200, fields)
    with pytest.raises(CommandError) as raised:
        await ask()
    assert raised.value.status == 1
    assert capsys.readouterr().out == ""


@ensureDeferred
async def test_unreachable(ask):
    with pytest.raises(CommandError) as raised:
        await ask("--url", "https://no-such-host.invalid")
    assert raised.value.status == 3
