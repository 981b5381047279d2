"""HTTP/2: what a stream takes of memory, and that it gives it back when it is over, whatever became of it."""

import gc
import tracemalloc
from collections.abc import Callable

import pytest
from frames import DATA, END_STREAM, GET, POST, RST_STREAM, Fields, RawClient, frame, head, settings, window
from h2.errors import ErrorCodes
from harness import COMPLETION
from msgspec.structs import replace
from surface import Surface
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure

from ai_ticket.web.request import Response
from ai_ticket.web.site import Route

METRICS: Fields = [GET[0], (b":path", b"/metrics"), *GET[2:]]
MISSING: Fields = [GET[0], (b":path", b"/nope"), *GET[2:]]
STRANGER: Fields = [field for field in POST if field[0] != b"authorization"]
SHORT: Fields = [*POST, (b"content-length", b"1")]


def lose(client: RawClient) -> None:
    client.connection.connectionLost(Failure(ConnectionDone()))
    client.transport.unregisterProducer()  # as real ones do


def reset(stream: int) -> bytes:
    return frame(RST_STREAM, 0, stream, bytes(4))


def body(stream: int, data: bytes) -> bytes:
    return frame(DATA, END_STREAM, stream, data)


@pytest.mark.parametrize(
    "request_of",
    [
        head,
        lambda stream: head(stream, METRICS),
        lambda stream: head(stream, MISSING),
        lambda stream: head(stream, STRANGER),
        lambda stream: head(stream, POST, ends=False) + body(stream, b'{"content":"x"}'),
        lambda stream: head(stream, POST, ends=False) + body(stream, b"{"),
        lambda stream: head(stream, SHORT, ends=False) + body(stream, b"{}"),
        lambda stream: head(stream, POST, ends=False) + reset(stream),
        lambda stream: head(stream, SHORT),
    ],
)
@pytest.mark.usefixtures("no_collector")
def test_a_stream_that_is_over_needs_no_collector(surface: Surface, request_of: Callable[[int], bytes]) -> None:
    client = RawClient(surface)
    client.send(request_of(1))
    gc.collect()
    for stream in range(3, 43, 2):
        client.send(request_of(stream))
    assert gc.collect() == 0
    lose(client)


@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.usefixtures("no_collector")
def test_a_connection_that_is_lost_needs_no_collector(surface: Surface, answered: bool) -> None:
    """With all of its streams waiting, for the caller's windows or for a backend."""
    surface.pipeline.answer = lambda: Deferred()
    gc.collect()
    for _ in range(3):
        client = RawClient(surface)
        client.send(settings(initial_window_size=0))
        for stream in range(1, 41, 2):
            waiting = head(stream, POST, ends=False) + body(stream, b'{"content":"x"}')
            client.send(head(stream, METRICS) if answered else waiting)
        lose(client)
        surface.pipeline.jobs.clear()
    del client
    assert gc.collect() == 0


def event(stream: int) -> bytes:
    return head(stream, POST, ends=False) + body(stream, b'{"content":"x"}')


def sweep(surface: Surface, seconds: float) -> None:
    surface.clock.advance(seconds)
    surface.connections._check_deadlines()


def test_an_answer_that_many_wait_for_is_there_once(surface: Surface) -> None:
    """As /metrics is, for which no token is needed."""
    shared = Response(200, b"x" * 100_000)

    async def large(request: object) -> Response:
        return shared

    surface.site._routes["/metrics"] = Route("/metrics", {"GET": large})
    client = RawClient(surface)
    client.send(settings(initial_window_size=0))
    tracemalloc.start()
    for stream in range(1, 21, 2):
        client.send(head(stream, METRICS))
    held, _ = tracemalloc.get_traced_memory()
    client.send(settings(initial_window_size=20_000))
    taking, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 100_000
    assert taking < 200_000, "what was sent, with this client, and not what was not"
    client.send(settings(initial_window_size=200_000) + window(2_000_000))
    assert [client.data(stream) for stream in range(1, 21, 2)] == [shared.body] * 10


def test_no_more_is_answered_where_too_much_waits(surface: Surface) -> None:
    surface.pipeline.answer = lambda: succeed(replace(COMPLETION, text="x" * 300_000))
    client = RawClient(surface)
    client.send(settings(initial_window_size=0) + b"".join(event(stream) for stream in range(1, 15, 2)))
    assert list(client.statuses()) == [1, 3, 5, 7]
    assert [stream for stream, code in client.resets() if code == ErrorCodes.REFUSED_STREAM] == [9, 11, 13]
    client.received.clear()
    client.send(window(10**7) + settings(initial_window_size=10**6))
    client.send(event(15))
    assert all(len(client.data(stream)) > 300_000 for stream in (1, 3, 5, 7, 15))


@pytest.mark.parametrize(("rate", "taken"), [(1, False), (40, False), (4200, True)])
def test_an_answer_must_be_taken_at_a_rate(surface: Surface, rate: int, taken: bool) -> None:
    """A byte now and then is not enough; how the caller shares it out among its streams is its own affair."""
    surface.pipeline.answer = lambda: succeed(replace(COMPLETION, text="x" * 40_000))
    client = RawClient(surface)
    client.send(settings(initial_window_size=0) + b"".join(event(stream) for stream in range(1, 21, 2)))
    for _ in range(110):
        client.send(b"".join(window(max(1, rate // 10), stream) for stream in range(1, 21, 2)) + window(rate))
        sweep(surface, 1)
    client.take()
    assert bool(client.resets()) is not taken
    assert all((len(client.data(stream)) > 40_000) is taken for stream in range(1, 21, 2))
    assert not client.goaway
