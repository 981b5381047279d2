"""The arguments of `ai-ticket`. Imports no more than argparse, so that `--help` is quick."""

import argparse
import math
import re
from collections.abc import Callable

from ai_ticket import __version__

_EXIT_STATUSES = """\
exit statuses:
  0    success
  1    refused or failed, and trying again won't help; settings that can't be used; `health`: degraded or draining;
       `batch`: an event failed
  2    wrong usage
  3    the service can't be reached: no connection, or its certificate is not trusted
  75   try again later: 429, 503 or 504, or no answer within --timeout
  130  interrupted by Ctrl-C
"""

_ABOUT_CHECK_CONFIG = """\
Print each setting in force and where it came from, then what the operator should know of them, without starting
anything. Off a terminal a line reads `NAME=value  # source`. Secrets are not shown. Problems come one a line on
stderr, with exit status 1."""

_ABOUT_TOKENS = """\
Make a strong token, add it to the token file under NAME, and print it, alone, on stdout: TOKEN=$(ai-ticket token bob).
The running service reads the file again by itself."""

_ABOUT_SEND = """\
Send one prompt to the service and print the completion, alone, on stdout. The prompt is sent as it is: JSON in it is
text like any other. With --stream it is printed as it comes; an answer that breaks off is an error, after the text
that had come. The address, the certificate to trust and the token are those of the service's own settings
(TLS_PORT, TLS_CERT_FILE, AI_TICKET_AUTH_TOKEN, AI_TICKET_AUTH_TOKEN_FILE), as far as the options don't say
otherwise. A certificate must always be trusted and name the host."""

_ABOUT_BATCH = """\
Send each line of INPUT, a JSON object, as an event, and write its answer or its error to OUTPUT as one line of JSON, as
each finishes: {"index": 0, "status": 200, "completion": ...}. `index` is the line's number in INPUT, from 0; blank
lines are skipped. They go to POST /events, behind the other events of the same caller, and wait for its quota there.
Address, certificate and token are those of `ai-ticket send`.

The same command resumes a run that was interrupted, however that was: what has its line in OUTPUT is not sent again,
and a last line that was not written to its end is. OUTPUT.state keeps the SHA-256 of INPUT, so that another INPUT is
refused, and a lock, so that a second run at the same time is. With `-`, or a pipe, for either file nothing can be
resumed.

Where the service asks to wait (429, 503), or can't be reached, nothing is sent until the time that it named, or for
1 s and then longer and longer. A token or a certificate that is not accepted ends the run; so does what answers and is
not the service."""

_ABOUT_HEALTH = """\
Print how the service and its backends are. Exit status: 0 healthy; 1 degraded, draining or an answer that is not the
service's; 3 unreachable; 75 no answer within --timeout."""

_ABOUT_FETCH_MODEL = """\
Download the model of the bundled local model server, unless it is there, and print its path on stdout."""

_ABOUT_FAKE_BACKEND = """\
Serve as KoboldCPP 1.115 does on the wire, without a model: it always says the same, in its own time, one request after
the other. The address is printed on stdout. KOBOLDCPP_API_URL=http://127.0.0.1:5001 makes the service use it. It runs
until it is interrupted."""


def parser() -> argparse.ArgumentParser:
    """The parser; what it returns has the name of the command's module as `module`."""
    main = argparse.ArgumentParser(
        prog="ai-ticket",
        description="Operate AI Ticket, and send it prompts.",
        epilog=_EXIT_STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    main.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = main.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, module: str, summary: str, description: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=description, epilog=_EXIT_STATUSES)
        added.formatter_class = argparse.RawDescriptionHelpFormatter
        added.set_defaults(module=f"ai_ticket.cli.{module}")
        return added

    check = command("check-config", "check_config", "check the settings, and show them", _ABOUT_CHECK_CONFIG)
    check.add_argument("--json", action="store_true", help="one JSON object instead")
    _add_token_arguments(command("token", "token", "make an access token", _ABOUT_TOKENS))
    _add_send_arguments(command("send", "send", "send a prompt, print the completion", _ABOUT_SEND))
    _add_batch_arguments(command("batch", "batch", "send a file of events", _ABOUT_BATCH))
    health = command("health", "health", "ask the service how it is", _ABOUT_HEALTH)
    _add_connection_arguments(health, timeout="10 s")
    health.add_argument("--json", action="store_true", help="print the service's answer as one line of JSON")
    command("fetch-model", "fetch_model", "download the local model", _ABOUT_FETCH_MODEL)
    fake = command("fake-backend", "fake_backend", "run a model server without a model", _ABOUT_FAKE_BACKEND)
    _add_fake_backend_arguments(fake)
    return main


def _add_token_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="NAME", type=_token_name, help="1 to 64 of A-Z a-z 0-9 . _ -")
    command.add_argument(
        "--file",
        metavar="FILE",
        help="the token file (default: AI_TICKET_AUTH_TOKEN_FILE, else ops/secrets/ai_ticket_auth_token.txt)",
    )
    command.add_argument("--hash", action="store_true", help="keep only the token's SHA-256 in the file")
    command.add_argument("--replace", action="store_true", help="put the new token in the place of NAME's old one")
    command.add_argument(
        "--weight",
        metavar="N",
        type=_integer(1, 100),
        help="NAME's turns in a round of the service's queue, 1 to 100 (default: 1; with --replace the old one's)",
    )


def _add_send_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompt", nargs="?", default="-", metavar="PROMPT", help="default, and `-`: stdin")
    event = command.add_argument_group("the event")
    event.add_argument("--system", metavar="TEXT", help="a system message ahead of the prompt")
    event.add_argument("--max-tokens", metavar="N", type=int, help="the longest completion, in tokens")
    event.add_argument("--temperature", metavar="X", type=_finite, help="0 to 5")
    event.add_argument("--top-p", metavar="X", type=_finite, help="above 0, up to 1")
    event.add_argument("--seed", metavar="N", type=int, help="for the same completion each time, where possible")
    event.add_argument("--stop", metavar="TEXT", action="append", help="end the completion here; may be repeated")
    event.add_argument(
        "--metadata", metavar="KEY=VALUE", action="append", type=_pair, help="comes back in the answer; may be repeated"
    )
    _add_connection_arguments(command, timeout="the service's own deadline and 10 s")
    _add_token_file_argument(command)
    command.add_argument("--stream", action="store_true", help="print the completion as it comes")
    command.add_argument(
        "--json",
        action="store_true",
        help="print the whole answer or error as one line of JSON; with --stream, each piece as a line as it comes",
    )


def _add_batch_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("input", metavar="INPUT", help="JSON objects, one a line; `-`: stdin")
    command.add_argument("output", metavar="OUTPUT", help="their answers, one a line; `-`: stdout")
    command.add_argument(
        "--concurrency",
        metavar="N",
        type=_integer(1, 1000),
        default=16,
        help="events under way at a time, at the most (default: %(default)s)",
    )
    command.add_argument(
        "--max-wait",
        metavar="SECONDS",
        type=_duration,
        default=3600.0,
        help="how long an event is put off where the service asks to wait or can't be reached (default: 3600)",
    )
    command.add_argument(
        "--retries",
        metavar="N",
        type=_integer(0, 100),
        default=2,
        help="how often an event is sent again after 502, 504 or --timeout (default: %(default)s)",
    )
    again = command.add_mutually_exclusive_group()
    again.add_argument("--retry-failed", action="store_true", help="when resuming, send again what has failed")
    again.add_argument("--overwrite", action="store_true", help="start anew, whatever is in OUTPUT")
    command.add_argument("--quiet", action="store_true", help="show no progress and no summary")
    _add_connection_arguments(command, timeout="the service's own deadline, --max-wait and 10 s")
    _add_token_file_argument(command)


def _add_token_file_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument("--token-file", metavar="FILE", help="send the first token of this file")


def _add_connection_arguments(command: argparse.ArgumentParser, *, timeout: str) -> None:
    connection = command.add_argument_group("the connection")
    connection.add_argument("--url", metavar="URL", help="the service's address (default: https://localhost:TLS_PORT)")
    connection.add_argument(
        "--cacert",
        metavar="FILE",
        help="certificates to trust besides the system's, PEM (default: TLS_CERT_FILE where it exists)",
    )
    connection.add_argument(
        "--timeout", metavar="SECONDS", type=_seconds, help=f"for the whole answer (default: {timeout})"
    )


def _add_fake_backend_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="to listen on (default: %(default)s)")
    command.add_argument(
        "--port", metavar="N", type=_integer(0, 65_535), default=5001, help="default: %(default)s; 0: any that is free"
    )
    model = command.add_argument_group("the model")
    model.add_argument(
        "--tokens-per-second", metavar="X", type=_rate, default=70.0, help="its speed (default: 70; `inf`: all at once)"
    )
    model.add_argument(
        "--first-token-seconds",
        metavar="SECONDS",
        type=_duration,
        default=0.0,
        help="how long it reads a prompt (default: 0; a stream's first token takes 0.35 s anyway)",
    )
    model.add_argument(
        "--context", metavar="N", type=_integer(16, 16_777_216), default=2048, help="in tokens (default: %(default)s)"
    )
    said = model.add_mutually_exclusive_group()
    said.add_argument("--echo", action="store_true", help="say the last message")
    said.add_argument("--text", metavar="TEXT", help="say this")
    server = command.add_argument_group("the server, as KoboldCPP's own options")
    server.add_argument(
        "--multiuser",
        metavar="N",
        type=_integer(0, 1_000_000),
        default=10,
        help="requests at a time: one runs, the others wait (default: %(default)s; 0: none waits)",
    )
    server.add_argument("--password", metavar="TEXT", help="ask for this key")


def _number(text: str, accept: Callable[[float], bool], allowed: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not accept(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
    return value


def _finite(text: str) -> float:
    return _number(text, math.isfinite, "a number")


def _seconds(text: str) -> float:
    return _number(text, lambda value: 0 < value <= 86400, "a number of seconds above 0, up to 86400")


def _duration(text: str) -> float:
    return _number(text, lambda value: 0 <= value <= 86400, "a number of seconds from 0 to 86400")


def _rate(text: str) -> float:
    return _number(text, lambda value: value > 0, "a number above 0, or `inf`")


def _integer(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,10}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)

    return parse


def _pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not (key and separator):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    return key, value


def _token_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 to 64 of A-Z a-z 0-9 . _ -")
    return text
