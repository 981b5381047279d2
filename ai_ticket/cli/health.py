"""`ai-ticket health`: how the service and its backends are."""

import json
from argparse import Namespace
from typing import Any

from treq.client import HTTPClient
from twisted.internet.interfaces import IReactorTime

from ai_ticket.cli import console, reactor
from ai_ticket.cli.http import exchange, make_client
from ai_ticket.cli.outcome import ExitStatus
from ai_ticket.cli.service import Service, locate

_TIMEOUT = 10.0


def run(options: Namespace) -> int:
    """Ask under a reactor of its own."""
    service = locate(options, timeout=_TIMEOUT)

    async def command(clock: Any) -> ExitStatus:
        return await health(clock, make_client(clock, service), service, as_json=options.json)

    return reactor.run(command)


async def health(clock: IReactorTime, client: HTTPClient, service: Service, *, as_json: bool) -> ExitStatus:
    """Ask and print the answer; any status but `healthy` is a failure.

    @raise CommandError: there is no answer, or it is not about health.
    """
    answer = await exchange(clock, client, service, "health")
    status = answer.fields.get("status")
    if not isinstance(status, str):
        raise answer.error()
    if as_json:
        console.out(answer.to_json())
    else:
        console.out(f"status: {status}")
        backends = answer.fields.get("backends")
        for name, state in backends.items() if isinstance(backends, dict) else ():
            console.out(f"backend {name}: {_brief(state)}")
    return ExitStatus.OK if answer.status == 200 and status == "healthy" else ExitStatus.FAILED


def _brief(state: Any) -> str:
    """What is said of a backend on one line, whatever it is."""
    if isinstance(state, dict):
        return " ".join(
            _brief(value) if name == "status" else f"{name}={_brief(value)}" for name, value in state.items()
        )
    return state if isinstance(state, str) else json.dumps(state, ensure_ascii=False)
