"""`ai-ticket send`: one prompt in, one completion out."""

import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import msgspec
from treq.client import HTTPClient
from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IReactorTime

from ai_ticket.cli import console, reactor
from ai_ticket.cli.body import Fields
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
    if options.stream:
        event["stream"] = True
    return event


async def send(
    clock: IReactorTime, client: HTTPClient, service: Service, event: dict[str, Any], *, as_json: bool
) -> ExitStatus:
    """Post the event and print the answer; as it comes, where the event asks for a stream.

    @raise CommandError: there is no completion, or no more of it.
    """
    with ExitStack() as spinner:
        spinner.enter_context(waiting("waiting for the completion"))
        pieces = _Pieces(service, before=spinner.close, as_json=as_json)
        receive = pieces.receive if event.get("stream") else None
        try:
            answer = await exchange(clock, client, service, "event", event=event, receive=receive)
        except (CommandError, CancelledError):
            pieces.break_off()
            raise
    if answer.status != 200 or "error" in answer.fields:
        pieces.break_off()
        no_token = answer.status == 401 and service.no_token
        raise answer.error(hint=f"No token was sent: {service.no_token}." if no_token else None)
    if pieces.began:
        pieces.end()
    else:
        completion = answer.fields.get("completion")
        if not isinstance(completion, str):
            raise CommandError("not_the_service", f"The answer of {service.address} has no completion.")
        console.out(answer.to_json() if as_json else completion)
    if answer.fields.get("finish_reason") == "length":
        console.say("note: the completion was cut at max_tokens")
    return ExitStatus.OK


class _Pieces:
    """Prints the pieces of a streamed answer; calls `before` ahead of what it prints."""

    def __init__(self, service: Service, *, before: Callable[[], None], as_json: bool):
        self._service = service
        self._before = before
        self._as_json = as_json
        self._printed = ""
        self.began = False

    def receive(self, piece: Fields) -> None:
        """Print a piece at once: its text, or all of it as a line of JSON."""
        delta = piece.get("delta")
        if not isinstance(delta, str):
            message = f"A piece of the answer of {self._service.address} has no text."
            raise CommandError("not_the_service", message)
        self.began = True
        if self._as_json:
            self._print(msgspec.json.encode(piece).decode() + "\n")
        elif delta:
            self._print(delta)

    def end(self) -> None:
        """End the last line, if the text has not."""
        if not self._as_json and not self._printed.endswith("\n"):
            self._print("\n")

    def break_off(self) -> None:
        """End the last line, if there is one."""
        if self._printed:
            self.end()

    def _print(self, text: str) -> None:
        self._before()
        console.out(text, end="")
        self._printed = text


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
