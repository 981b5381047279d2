"""`ai-ticket batch`: a file of events in, a file of answers out."""

import os
import random
import stat
import sys
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager
from typing import Any, BinaryIO

from msgspec import structs
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IReactorTime
from twisted.web.client import HTTPConnectionPool

from ai_ticket.cli import console, reactor
from ai_ticket.cli.batch_delivery import Delivery, Gate, Post, error_result
from ai_ticket.cli.batch_input import LONGEST_LINE, FileLines, Lines, PipedLines, Survey, survey
from ai_ticket.cli.batch_output import Output, open_output
from ai_ticket.cli.batch_progress import Tally, shown
from ai_ticket.cli.http import Answer, exchange, make_client
from ai_ticket.cli.outcome import CommandError, ExitStatus
from ai_ticket.cli.service import Service, locate
from ai_ticket.cli.spinner import waiting

_IDLE_CONNECTION = 30
"""How long a connection is kept for the next event, in seconds: less than the service does."""


def run(options: Namespace) -> int:
    """Send the events under a reactor of its own."""
    service = locate(options, with_token=True)
    if options.timeout is None:  # an event of a batch waits in the service for its caller's quota
        service = structs.replace(service, timeout=service.timeout + options.max_wait)
    try:
        with ExitStack() as opened:
            source = opened.enter_context(_open_input(options))
            surveyed = _survey(source, options)
            output = open_output(
                options.output, surveyed, overwrite=options.overwrite, retry_failed=options.retry_failed
            )
            opened.callback(output.close)
            if not output.resumable and not options.quiet:
                console.say("note: a pipe can't be resumed; if this is interrupted, start anew")

            async def command(reactor: Any) -> ExitStatus:
                lines = FileLines(source) if surveyed else PipedLines(reactor, source.fileno())
                async with connected(reactor, service, options.concurrency) as post:
                    return await batch(
                        reactor, random.random, post, lines=lines, output=output, surveyed=surveyed, options=options
                    )

            return reactor.run(command)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        raise CommandError("file_error", f"{where}{error.strerror or error}")


@asynccontextmanager
async def connected(reactor: Any, service: Service, connections: int) -> AsyncIterator[Post]:
    """What sends a line to the service, over connections that are kept for the next."""
    pool = HTTPConnectionPool(reactor)
    pool.maxPersistentPerHost = connections
    pool.cachedConnectionTimeout = _IDLE_CONNECTION
    client = make_client(reactor, service, pool)

    async def post(line: bytes) -> Answer:
        answer = await exchange(reactor, client, service, "events", line=line)
        if answer.status == 401 and service.no_token:
            raise answer.error(hint=f"No token was sent: {service.no_token}.")
        return answer

    try:
        yield post
    finally:
        await pool.closeCachedConnections()


async def batch(
    clock: IReactorTime,
    random: Callable[[], float],
    post: Post,
    *,
    lines: Lines,
    output: Output,
    surveyed: Survey | None,
    options: Namespace,
) -> ExitStatus:
    """Get each event its answer, `options.concurrency` at a time, and write it; say how it went.

    @raise CommandError: the service would answer none.
    """
    tally = Tally(clock, surveyed.events if surveyed else None, output.done.count, output.done.failed)
    gate = Gate(clock, random)
    delivery = Delivery(clock, post, gate, random, max_wait=options.max_wait, retries=options.retries)

    async def work() -> None:
        async for line in lines:
            if line.number in output.done:
                continue
            if line.content is None:
                message = f"A line may have up to {LONGEST_LINE} bytes."
                result = error_result(413, "payload_too_large", message)
            else:
                result = await delivery.answer(line.content)
            output.write({"index": line.number} | result | {"index": line.number})
            tally.add(result)

    whole = False
    try:
        with ExitStack() as display:
            if not options.quiet:
                # A bar and answers on the same terminal would write over each other.
                answers_are_shown = options.output == "-" and sys.stdout.isatty()
                display.enter_context(shown(clock, tally, gate, bar=not answers_are_shown))
            await _side_by_side([work() for _ in range(options.concurrency)], delivery.stop)
        whole = True
    finally:
        if not options.quiet:
            _conclude(tally, whole=whole, resumable=output.resumable)
    return ExitStatus.FAILED if tally.failed or tally.earlier_failed else ExitStatus.OK


async def _side_by_side(works: list[Coroutine[Any, Any, None]], stop: Callable[[], None]) -> None:
    """Run them until all have ended; the first to fail, or to be cancelled here, ends the others after `stop`."""
    ended: Deferred[None] = Deferred()
    running = [Deferred.fromCoroutine(work) for work in works]
    all_of_them = DeferredList(running, fireOnOneErrback=True, consumeErrors=True)
    all_of_them.addCallbacks(lambda _: ended.callback(None), lambda first: ended.errback(first.value.subFailure))
    try:
        await ended
    finally:
        stop()
        for one in running:
            one.cancel()


def _conclude(tally: Tally, *, whole: bool, resumable: bool) -> None:
    for line in tally.summary():
        console.say(line)
    if not whole:
        left = "" if tally.total is None else f" with {tally.total - tally.earlier - tally.finished:,} events to go"
        how = "the same command goes on from here" if resumable else "there is no way to go on from here"
        console.say(f"stopped{left}: {how}")
    elif resumable and (failed := tally.failed + tally.earlier_failed):
        console.say(f"--retry-failed sends the {failed:,} that failed again")


def _open_input(options: Namespace) -> BinaryIO:
    if options.input == "-":
        return open(sys.stdin.fileno(), "rb", closefd=False)
    if all(map(os.path.exists, (options.input, options.output))) and os.path.samefile(options.input, options.output):
        raise CommandError("usage", "INPUT and OUTPUT are the same file.", status=ExitStatus.USAGE)
    return open(options.input, "rb")


def _survey(source: BinaryIO, options: Namespace) -> Survey | None:
    if options.input == "-" or not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
        return None
    with waiting(f"reading {options.input}"):
        return survey(source)
