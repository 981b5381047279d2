"""HTTP/1.1: a connection gives its memory back when it is over, whatever it was at."""

import gc

import pytest
from surface import Surface
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure

POST = b"POST /event HTTP/1.1\r\nHost: x\r\nX-API-Key: secret\r\nContent-Type: application/json\r\n"
OFFER = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HT",
        b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 3,
        OFFER,
        OFFER + b"CONNECT x HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        POST + b'Content-Length: 15\r\n\r\n{"content":',
        POST + b'Content-Length: 15\r\n\r\n{"content":"x"}',
        POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
        POST + b"Transfer-Encoding: chunked\r\n\r\nx\r\n{",
    ],
)
@pytest.mark.usefixtures("no_collector")
def test_a_connection_that_is_lost_needs_no_collector(surface: Surface, sent: bytes) -> None:
    surface.pipeline.answer = lambda: Deferred()
    for _ in range(3):
        gc.collect()  # what the first of its kind leaves behind is not counted
        connection, transport = surface.connect()
        connection.dataReceived(sent)
        connection.connectionLost(Failure(ConnectionDone()))
        if transport.producer is not None:
            transport.unregisterProducer()  # as real ones do
        surface.pipeline.jobs.clear()
        del connection, transport
    assert gc.collect() == 0
