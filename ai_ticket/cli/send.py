"""`ai-ticket send`: one prompt in, one completion out."""

import sys
from argparse import Namespace
from typing import Any

from treq.client import HTTPClient
from twisted.internet.interfaces import IReactorTime

from ai_ticket.cli import console, reactor
from ai_ticket.cli.http import exchange, make_client
from ai_ticket.cli.outcome import CommandError, ExitStatus
from ai_ticket.cli.service import Service, locate
from ai_ticket.cli.spinner import waiting

_PARAMETERS = ("max_tokens", "temperature", "top_p", "seed", "stop")


def run(options: Namespace) -> int:
    """Send the prompt under a reactor of its own."""
    service = locate(options, with_token=True)
    event = make_event(options, _prompt(options.prompt))

    async def command(clock: Any) -> ExitStatus:
        return await send(clock, make_client(clock, service), service, event, as_json=options.json)

    return reactor.run(command)


def make_event(options: Namespace, prompt: str) -> dict[str, Any]:
    """The event of the options; what was not asked for is left to the service."""
    # As an object, because the service looks into a bare string for JSON; a prompt from here is what it is.
    event: dict[str, Any] = {"content": {"prompt": prompt}}
    if options.system is not None:
        messages = [{"role": "system", "content": options.system}, {"role": "user", "content": prompt}]
        event["content"] = {"messages": messages}
    parameters = {name: getattr(options, name) for name in _PARAMETERS if getattr(options, name) is not None}
    if parameters:
        event["parameters"] = parameters
    if options.metadata:
        event["metadata"] = dict(options.metadata)
    return event


async def send(
    clock: IReactorTime, client: HTTPClient, service: Service, event: dict[str, Any], *, as_json: bool
) -> ExitStatus:
    """Post the event and print the answer.

    @raise CommandError: there is no completion.
    """
    with waiting("waiting for the completion"):
        answer = await exchange(clock, client, service, "event", event=event)
    if answer.status != 200:
        no_token = answer.status == 401 and service.no_token
        raise answer.error(hint=f"No token was sent: {service.no_token}." if no_token else None)
    completion = answer.fields.get("completion")
    if not isinstance(completion, str):
        raise CommandError("not_the_service", f"The answer of {service.address} has no completion.")
    console.out(answer.to_json() if as_json else completion)
    if answer.fields.get("finish_reason") == "length":
        console.say("note: the completion was cut at max_tokens")
    return ExitStatus.OK


def _prompt(argument: str) -> str:
    """The prompt, from stdin where the argument says so."""
    try:
        if argument != "-":
            # What is not UTF-8 on a command line comes as lone surrogates, which JSON can't carry.
            return argument.encode("utf-8", "surrogateescape").decode("utf-8")
        if sys.stdin.isatty():
            console.say("Type the prompt; Ctrl-D ends it.")
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CommandError("usage", f"The prompt is not UTF-8 (byte {error.start}).", status=ExitStatus.USAGE)
