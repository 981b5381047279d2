"""The places that read what others wrote, in memory: each tries one case, and knows what must never come of it."""

import re
from collections.abc import Callable
from random import Random
from typing import Any

from harness import Answer, Attempts, MemoryServer, MemoryTransport, recorded
from logged import clean_log
from surface import Surface, make_surface
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from ai_ticket.backend.address import Location
from ai_ticket.backend.kobold import BackendTimeouts, KoboldBackend
from ai_ticket.backend.server import ModelServer
from ai_ticket.errors import DomainError
from ai_ticket.event import Completion, Event, Message, Parameters
from ai_ticket.web.connection import Connection
from fuzz import answers, documents, http1, http2
from fuzz.mutation import split

TOKEN = b"secret"
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


class Wrong(AssertionError):
    """What must not be; `case` is what was sent."""

    def __init__(self, what: str, case: Any):
        super().__init__(f"{what}\n{case!r}")


def statuses(data: bytes) -> list[int]:
    """Those of all answers in these bytes but `100 Continue`. No answer has what could be taken for one in it."""
    return [int(status) for status in _STATUS.findall(data) if status != b"100"]


def _connect(surface: Surface, *, http2: bool = False) -> tuple[Connection, MemoryTransport]:
    transport = MemoryTransport()
    connection = Connection(surface.connections, surface.site, "192.0.2.7", http2)
    transport.negotiatedProtocol = b"h2" if http2 else None
    connection.makeConnection(transport)
    if http2:
        connection.handshakeCompleted()
    return connection, transport


def _send(surface: Surface, pieces: list[bytes], *, http2: bool = False) -> bytes:
    """What comes back for these bytes, once every deadline is over; by then nothing may be left of it.

    @raise AssertionError: something is.
    """
    connection, transport = _connect(surface, http2=http2)
    for piece in pieces:
        if not transport.disconnecting:
            connection.dataReceived(piece)
    for _ in range(10):
        surface.clock.advance(0)
    for _ in range(4):
        if not transport.disconnecting:
            surface.clock.advance(40.0)
    assert transport.disconnecting, "the connection outlives its deadlines"
    connection.connectionLost(Failure(ConnectionDone()))
    surface.clock.advance(0)
    assert not len(surface.connections), "a connection is left"
    assert not surface.site.in_flight, "a request is left"
    assert not surface.recorder.in_flight, "a request is left in the metrics"
    return transport.value()


class Target:
    """Something to fuzz. `case` tries one thing; nothing is kept between cases that could tell the next apart."""

    def case(self, random: Random) -> None:
        """@raise AssertionError: it went wrong."""
        raise NotImplementedError


class _Site(Target):
    """With a new site now and then, for it remembers wrong tokens."""

    def __init__(self) -> None:
        self._uses = 0
        self._made: Surface | None = None

    def surface(self) -> Surface:
        if self._made is None or self._uses >= 50:
            self._made = make_surface()
            self._made.connections.start()
            self._uses = 0
        self._uses += 1
        self._made.pipeline.jobs.clear()
        self._made.recorder.finished.clear()
        return self._made


class Http1(_Site):
    """Requests of HTTP/1.1, good and bad. They mean the same however they are cut into packets."""

    def case(self, random: Random) -> None:
        case = http1.noise(random) if random.random() < 0.05 else http1.make(random, TOKEN)
        surface = self.surface()
        with clean_log():
            whole = statuses(_send(surface, [case.data]))
            jobs = len(surface.pipeline.jobs)
            surface.pipeline.jobs.clear()
            pieces = split(random, case.data)
            parts = statuses(_send(surface, pieces))
        # Where a body goes wrong behind an answer that was given from the head, there may be one more.
        if not _begin_alike(whole, parts) or jobs != len(surface.pipeline.jobs):
            raise Wrong(f"{case.about}: {whole} in one piece, {parts} in {len(pieces)}", [case.data, pieces])
        check_statuses(case, whole)


def _begin_alike(one: list[int], other: list[int]) -> bool:
    # A head may be both malformed and too large: which of it is found first depends on how it arrives.
    pairs = zip(one, other, strict=False)
    return bool(one) == bool(other) and all(a == b or {a, b} == {400, 431} for a, b in pairs)


def check_statuses(case: http1.Case, found: list[int]) -> None:
    """@raise Wrong: these are not the answers to it."""
    if any(status >= 500 for status in found):
        raise Wrong(f"{case.about}: {found}", case.data)
    if case.verdict == "good" and found[:1] != [200]:
        raise Wrong(f"{case.about}: {found} for what is well-formed", case.data)
    if case.verdict == "bad" and (len(found) > 1 or any(status < 400 for status in found)):
        raise Wrong(f"{case.about}: {found} for what must be refused", case.data)


class Http2(_Site):
    """Connections of HTTP/2, whose frames and header blocks may be malformed."""

    def case(self, random: Random) -> None:
        case = http2.make(random, TOKEN)
        with clean_log():
            sent = _send(self.surface(), split(random, case.data) if random.random() < 0.5 else [case.data], http2=True)
        found, _ = http2.statuses(sent)
        if any(status >= 500 for status in found.values()):
            raise Wrong(f"{case.about}: {found}", case.data)
        if any(found.get(stream, 400) < 400 for stream in case.refused):
            raise Wrong(f"{case.about}: {found}, and none of {set(case.refused)} may succeed", case.data)
        if any(found.get(stream) != 200 for stream in case.answered):
            raise Wrong(f"{case.about}: {found}, and {set(case.answered)} are well-formed", case.data)


class Bodies(_Site):
    """Bodies of all kinds in well-formed requests: an event's, a batch's as an array and as lines."""

    def case(self, random: Random) -> None:
        path, media_type = random.choice(
            [(b"/event", b"application/json"), (b"/events", b"application/json"), (b"/events", b"application/x-ndjson")]
        )
        body = documents.document(random) if path == b"/event" else documents.batch(random)
        data = (
            b"POST %s HTTP/1.1\r\nHost: x\r\nX-API-Key: secret\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s"
            % (
                path,
                media_type,
                len(body),
                body,
            )
        )
        with clean_log():
            sent = _send(self.surface(), split(random, data))
        if any(status >= 500 for status in statuses(sent)) or len(statuses(sent)) != 1:
            raise Wrong(f"{path.decode()}: {statuses(sent)}", body)
        if b"internal_error" in sent:
            raise Wrong(f"{path.decode()}: {sent!r}", body)


class Backend(Target):
    """Answers of model servers, to all that they are asked."""

    def case(self, random: Random) -> None:
        clock = Clock()
        server = MemoryServer(clock, self._answers(random))
        backend = KoboldBackend(
            "host:5001",
            ModelServer(server.http, clock, lambda: Location("http://host:5001", None)),
            clock=clock,
            timeouts=BackendTimeouts(None, 30.0),
            slots=None,
            new_key=lambda: "key",
            recorder=Attempts(),
        )
        event = Event([Message("user", "hi")], Parameters(max_tokens=100))
        with clean_log():
            for start in (backend.probe, lambda: backend.complete(event, clock.seconds() + 120.0), backend.settle):
                found: list[Any] = []
                Deferred.fromCoroutine(start()).addBoth(found.append)
                for seconds in (*[0.0] * 60, *[1.0] * 20, *[20.0] * 10):
                    if found:
                        break
                    clock.advance(seconds)
                if not found:
                    raise Wrong("it never ends", server.answers)
                if isinstance(found[0], Failure) and not isinstance(found[0].value, DomainError):
                    raise Wrong(found[0].getTraceback(), server.answers)
                if isinstance(found[0], Completion) and (found[0].finish_reason not in ("stop", "length")):
                    raise Wrong(repr(found[0]), server.answers)

    def _answers(self, random: Random) -> dict[str, Answer]:
        paths = ["POST /v1/chat/completions", "POST /api/extra/generate/stream", "POST /v1/completions"]
        found = {path: answers.answer(random) for path in paths}
        found["POST /api/extra/abort"] = recorded("koboldcpp/busy-abort.txt")
        about = {
            "GET /api/extra/version": "koboldcpp/get-api_extra_version.txt",
            "GET /v1/models": "koboldcpp/get-v1_models.txt",
            "GET /api/extra/true_max_context_length": "koboldcpp/get-api_extra_true_max_context_length.txt",
            "GET /api/extra/perf": "koboldcpp/get-api_extra_perf.txt",
        }
        if random.random() < 0.3:
            about = {"GET /props": "llamacpp/props.txt"}
        for path, name in about.items():
            found[path] = answers.answer(random) if random.random() < 0.15 else recorded(name)
        return found


TARGETS: dict[str, Callable[[], Target]] = {"http1": Http1, "http2": Http2, "bodies": Bodies, "backend": Backend}


def random_of(seed: int, target: str, number: int) -> Random:
    """The randomness of one case: the same for the same numbers."""
    return Random(f"{seed} {target} {number}")


def try_case(target: Target, name: str, seed: int, number: int) -> None:
    """@raise AssertionError: it went wrong; the message says how to do it again."""
    try:
        target.case(random_of(seed, name, number))
    except Exception as error:
        error.add_note(f"again: python -m tests.fuzz --seed {seed} --target {name} --case {number}")
        raise
