"""The limiter in Redis: against a real server and its time, and against one that a test plays."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from daemon import Certificates
from pytest_twisted import blockon, ensureDeferred
from redis_server import RedisServer
from twisted.internet import reactor as _reactor
from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.internet.endpoints import TCP4ServerEndpoint, UNIXClientEndpoint, wrapServerTLS
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionRefusedError
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import PrivateCertificate
from twisted.internet.task import deferLater
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.python.failure import Failure

from ai_ticket.interfaces import Admission
from ai_ticket.limit.address import RedisAddress, parse_redis_url
from ai_ticket.limit.redis import CALL_SECONDS, CONNECT_SECONDS, PAUSE_SECONDS, RedisLimiter, RedisUnavailable

reactor: Any = _reactor
SECRET = "hush-Zq81"
Connect = Callable[..., RedisLimiter]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Makes limiters, and closes them."""
    limiters = []

    def make(url: str, limit: int = 120, window: float = 60.0) -> RedisLimiter:
        limiters.append(RedisLimiter(reactor, parse_redis_url(url), limit=limit, window=window))
        return limiters[-1]

    yield make
    for limiter in limiters:
        blockon(limiter.close())


async def reason(asking: Deferred[Admission]) -> str:
    """What a call fails with."""
    with pytest.raises(RedisUnavailable) as caught:
        await asking
    return str(caught.value)


class TestServer:
    """A real one, by its own time."""

    @ensureDeferred
    async def test_fifty_callers_of_two_services_get_the_limit_and_no_more(
        self, redis: RedisServer, connect: Connect
    ) -> None:
        limiters = [connect(redis.url), connect(redis.url)]

        async def call(number: int) -> int:
            return sum([(await limiters[number % 2].admit("fifty")).admitted for _ in range(5)])

        callers = await gatherResults([Deferred.fromCoroutine(call(number)) for number in range(50)])
        assert sum(callers) == 120

    @ensureDeferred
    async def test_its_time_goes_on_in_microseconds(self, redis: RedisServer, connect: Connect) -> None:
        limiter = connect(redis.url)
        waits = [(await limiter.admit("time")).retry_after for _ in range(50)]
        assert waits == sorted(waits, reverse=True)
        assert waits[0] == 60.0
        assert 0 < waits[0] - waits[-1] < 10

    @ensureDeferred
    async def test_its_times_are_kept_to_the_last_digit_and_no_longer_than_they_count(
        self, redis: RedisServer, connect: Connect
    ) -> None:
        await connect(redis.url).admit("kept")
        key = "ai-ticket:calls:60000000:kept"
        _, _, offset, _, time, _ = redis.run("LRANGE", key, "0", "-1").decode().split("\r\n")
        assert offset == "0"
        assert time.isdecimal()
        assert len(time) == 16
        assert 60_000 < int(redis.run("PTTL", key)[1:]) <= 61_000

    @ensureDeferred
    async def test_it_may_forget_the_script(self, redis: RedisServer, connect: Connect) -> None:
        limiter = connect(redis.url)
        assert (await limiter.admit("script")).remaining == 119
        redis.run("SCRIPT", "FLUSH")
        assert (await limiter.admit("script")).remaining == 118

    @ensureDeferred
    async def test_windows_of_different_lengths_are_counted_apart(self, redis: RedisServer, connect: Connect) -> None:
        assert (await connect(redis.url, window=60.0).admit("windows")).remaining == 119
        assert (await connect(redis.url, window=0.5).admit("windows")).remaining == 119

    @ensureDeferred
    async def test_looking_whether_it_works_counts_for_nobody(self, redis: RedisServer, connect: Connect) -> None:
        limiter = connect(redis.url, limit=1)
        for _ in range(3):
            assert (await limiter.check()).admitted
        assert redis.run("LLEN", "ai-ticket:calls:check") == b":2\r\n"
        assert (await limiter.admit("check")).admitted

    @pytest.mark.parametrize(
        ("spoil", "mend", "why"),
        [
            ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0", "OOM"),
            ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE", "READONLY"),
            ("ACL SETUSER default -lpush -rpush", "ACL SETUSER default +@all", "ACL failure"),
        ],
    )
    @ensureDeferred
    async def test_where_it_can_not_count_it_is_away(
        self, own_redis: RedisServer, connect: Connect, spoil: str, mend: str, why: str
    ) -> None:
        limiter = connect(own_redis.url)
        await limiter.admit("a")
        assert own_redis.run(*spoil.split()) == b"+OK\r\n"
        assert why in await reason(limiter.admit("a"))
        assert why in await reason(limiter.check())
        assert own_redis.run(*mend.split()) == b"+OK\r\n"
        assert (await limiter.check()).admitted
        assert (await limiter.admit("a")).remaining == 118

    @ensureDeferred
    async def test_it_connects_anew(self, own_redis: RedisServer, connect: Connect) -> None:
        limiter = connect(own_redis.url)
        await limiter.admit("a")
        own_redis.kill()
        assert await reason(limiter.admit("a"))
        own_redis.start()
        while await limiter.check().addErrback(lambda failure: failure.trap(RedisUnavailable)) is RedisUnavailable:
            await deferLater(reactor, 0.01)
        assert (await limiter.admit("a")).remaining == 119


class TestLogin:
    """Who we are to it."""

    @pytest.fixture
    def guarded(self, own_redis: RedisServer) -> RedisServer:
        for command in (f"ACL SETUSER me on >{SECRET} ~* +@all", f"CONFIG SET requirepass {SECRET}-2"):
            assert own_redis.run(*command.split()).startswith((b"+OK", b"-NOAUTH"))
        return own_redis

    @pytest.mark.parametrize("login", [f"me:{SECRET}", f":{SECRET}-2"])
    @ensureDeferred
    async def test_the_right_password(self, guarded: RedisServer, connect: Connect, login: str) -> None:
        limiter = connect(guarded.url.replace("//", f"//{login}@"))
        assert (await limiter.admit("a")).admitted

    @pytest.mark.parametrize(("login", "why"), [("me:hush-Zq", "WRONGPASS"), (":hush-Zq", "WRONGPASS"), ("", "NOAUTH")])
    @ensureDeferred
    async def test_a_wrong_password(self, guarded: RedisServer, connect: Connect, login: str, why: str) -> None:
        limiter = connect(guarded.url.replace("//", f"//{login}@" if login else "//"))
        said = await reason(limiter.admit("a"))
        assert why in said
        assert "hush" not in said


class _Pipe(Protocol):
    """One end of a connection that is passed on."""

    def __init__(self) -> None:
        self.other: _Pipe | None = None
        self.early = b""
        self.closed: Deferred[None] = Deferred()

    def join(self, other: "_Pipe") -> None:
        self.other, other.other = other, self
        other.transport.write(self.early)

    def dataReceived(self, data: bytes) -> None:
        if self.other is None:
            self.early += data
        else:
            self.other.transport.write(data)

    def connectionLost(self, why: Any = None) -> None:
        if self.other is not None:
            self.other.transport.loseConnection()
        self.closed.callback(None)


class _Pipes(Factory):
    """Passes connections on to a Unix socket."""

    noisy = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.made: list[_Pipe] = []

    def buildProtocol(self, address: Any) -> _Pipe:
        near, far = _Pipe(), _Pipe()
        self.made += [near, far]
        end = Factory.forProtocol(lambda: far)
        end.noisy = False
        UNIXClientEndpoint(reactor, str(self.path)).connect(end).addCallback(near.join)
        return near


@asynccontextmanager
async def listening(path: Path, certificates: Certificates | None = None) -> AsyncIterator[int]:
    """A TCP port for a server on a Unix socket; with certificates, one for TLS."""
    endpoint: Any = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
    if certificates is not None:
        pem = certificates.key.read_text() + certificates.certificate.read_text()
        endpoint = wrapServerTLS(PrivateCertificate.loadPEM(pem).options(), endpoint)
    pipes = _Pipes(path)
    port = await endpoint.listen(pipes)
    try:
        yield port.getHost().port
    finally:
        await port.stopListening()
        ends = [pipe for pipe in pipes.made if pipe.transport is not None]
        for end in (end for end in ends if not end.closed.called):
            end.transport.abortConnection()
        await gatherResults([end.closed for end in ends])


class TestNetwork:
    """Over TCP, with and without TLS."""

    @pytest.fixture
    def certificates(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Certificates:
        """Of an authority that this process takes for one of the system's."""
        made = Certificates(tmp_path)
        monkeypatch.setenv("SSL_CERT_FILE", str(made.ca))
        return made

    @ensureDeferred
    async def test_a_database(self, own_redis: RedisServer, connect: Connect) -> None:
        async with listening(own_redis.path) as port:
            limiter = connect(f"redis://127.0.0.1:{port}/5", limit=3)
            assert (await limiter.admit("a")).remaining == 2
            assert b"db5:keys=1" in own_redis.run("INFO", "keyspace")
            await limiter.close()

    @ensureDeferred
    async def test_one_that_is_not_there(self, own_redis: RedisServer, connect: Connect) -> None:
        async with listening(own_redis.path) as port:
            assert "DB index" in await reason(connect(f"redis://127.0.0.1:{port}/99").admit("a"))

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
    @ensureDeferred
    async def test_tls(self, redis: RedisServer, connect: Connect, certificates: Certificates, host: str) -> None:
        async with listening(redis.path, certificates) as port:
            limiter = connect(f"rediss://{host}:{port}", limit=3)
            assert (await limiter.admit(f"tls {host}")).remaining == 2
            await limiter.close()

    @ensureDeferred
    async def test_tls_with_a_certificate_of_a_stranger(
        self, redis: RedisServer, connect: Connect, certificates: Certificates
    ) -> None:
        certificates.authority = trustme.CA()
        certificates.issue()
        async with listening(redis.path, certificates) as port:
            assert "certificate verify failed" in await reason(connect(f"rediss://127.0.0.1:{port}").admit("a"))

    @pytest.mark.parametrize("host", [["elsewhere"], []])
    @ensureDeferred
    async def test_tls_with_a_certificate_for_another_host_or_none(
        self, redis: RedisServer, connect: Connect, certificates: Certificates, host: list[str]
    ) -> None:
        issued = certificates.authority.issue_cert(*host, common_name="127.0.0.1")
        certificates.certificate.write_bytes(issued.cert_chain_pems[0].bytes())
        issued.private_key_pem.write_to_path(certificates.key)
        async with listening(redis.path, certificates) as port:
            assert "connection lost" in await reason(connect(f"rediss://127.0.0.1:{port}").admit("a"))

    @ensureDeferred
    async def test_nobody_there(self, connect: Connect) -> None:
        assert "refused" in await reason(connect("redis://127.0.0.1:1").admit("a"))
        assert "No such file" in await reason(connect("unix:///no/such/redis.sock").admit("a"))


class Played:
    """A limiter on a clock of its own, and the connections that it makes, which a test answers."""

    def __init__(self, **login: Any) -> None:
        self.reactor = MemoryReactorClock()
        self.limiter = RedisLimiter(self.reactor, RedisAddress(path="/redis", **login), limit=5, window=60.0)
        self.answers: list[Any] = []

    def ask(self) -> Deferred[Admission]:
        asking = self.limiter.admit("a")
        asking.addBoth(self.answers.append)
        return asking

    @property
    def reasons(self) -> list[str]:
        """What calls have failed with so far."""
        for answer in self.answers:
            answer.trap(RedisUnavailable)
        return [answer.getErrorMessage() for answer in self.answers]

    def attempts(self) -> int:
        return len(self.reactor.unixClients)

    def accept(self) -> tuple[Any, StringTransport]:
        """Let it connect."""
        protocol = self.reactor.unixClients[-1][1].buildProtocol(None)
        transport = StringTransport()
        protocol.makeConnection(transport)
        return protocol, transport

    def refuse(self) -> None:
        self.reactor.unixClients[-1][1].clientConnectionFailed(None, Failure(ConnectionRefusedError()))

    def connected(self) -> tuple[Any, StringTransport]:
        """Let it connect and answer the PING."""
        protocol, transport = self.accept()
        assert b"PING" in transport.value()
        transport.clear()
        protocol.dataReceived(b"+PONG\r\n")
        return protocol, transport


ADMITTED = b"*3\r\n:1\r\n:4\r\n:60000000\r\n"
REFUSED = b"*3\r\n:0\r\n:0\r\n:1500000\r\n"


class TestTime:
    """What it waits for, and how long."""

    def test_an_answer_in_pieces(self) -> None:
        played = Played()
        played.ask()
        protocol, _ = played.connected()
        for byte in REFUSED:
            protocol.dataReceived(bytes([byte]))
        assert played.answers == [Admission(False, 0, 1.5)]
        assert played.reactor.getDelayedCalls() == []

    def test_no_answer_in_time(self) -> None:
        """The connection is given up with it, for later answers may stay away as well."""
        played = Played()
        played.ask()
        protocol, transport = played.connected()
        played.reactor.advance(CALL_SECONDS / 2)
        played.ask()
        played.reactor.advance(CALL_SECONDS / 2)
        assert played.reasons == ["no answer within 0.25 s"]
        assert transport.disconnected
        protocol.connectionLost(Failure(ConnectionAborted()))
        assert len(played.reasons) == 2
        assert played.reactor.getDelayedCalls() == []
        played.ask()
        assert played.attempts() == 2

    def test_no_connection_in_time(self) -> None:
        """The call does not wait for it, but it may still come."""
        played = Played()
        played.ask()
        played.reactor.advance(CALL_SECONDS)
        assert played.reasons == ["not connected yet"]
        played.ask()
        assert played.attempts() == 1
        protocol, _ = played.connected()
        protocol.dataReceived(ADMITTED)
        assert played.answers[1] == Admission(True, 4, 60.0)

    def test_waiting_for_the_connection_is_part_of_the_time(self) -> None:
        played = Played()
        played.ask()
        played.reactor.advance(0.2)
        played.connected()
        played.reactor.advance(0.04)
        assert played.answers == []
        played.reactor.advance(0.01)
        assert played.reasons == ["no answer within 0.25 s"]

    def test_a_server_that_accepts_and_then_says_nothing(self) -> None:
        played = Played()
        played.ask()
        protocol, transport = played.accept()
        played.reactor.advance(CONNECT_SECONDS)
        assert transport.disconnected
        protocol.connectionLost(Failure(ConnectionAborted()))
        played.ask()
        assert played.reasons == ["not connected yet", "no connection within 5.0 s"]

    def test_it_is_left_alone_for_a_while_after_it_could_not_be_reached(self) -> None:
        played = Played()
        played.ask()
        played.refuse()
        played.ask()
        played.reactor.advance(PAUSE_SECONDS - 0.01)
        played.ask()
        assert played.attempts() == 1
        assert len(played.reasons) == 3
        assert played.reasons == ["Connection was refused by other side."] * 3
        played.reactor.advance(0.01)
        played.ask()
        assert played.attempts() == 2
        assert len(played.answers) == 3

    def test_who_leaves_takes_no_answer_from_those_who_stay(self) -> None:
        played = Played()
        leaving = played.ask()
        staying = played.ask()
        protocol, transport = played.connected()
        leaving.cancel()
        played.answers.pop().trap(CancelledError)
        protocol.dataReceived(REFUSED + ADMITTED)
        assert played.answers == [Admission(True, 4, 60.0)]
        assert staying.called
        assert not transport.disconnected

    def test_who_leaves_while_it_connects_leaves_the_others_to_wait(self) -> None:
        played = Played()
        leaving = played.ask()
        played.ask()
        leaving.cancel()
        played.answers.pop().trap(CancelledError)
        protocol, _ = played.connected()
        protocol.dataReceived(ADMITTED)
        assert played.answers == [Admission(True, 4, 60.0)]

    def test_closing_while_it_connects(self) -> None:
        played = Played()
        played.ask()
        protocol, transport = played.accept()
        closed: list[None] = []
        played.limiter.close().addCallback(closed.append)
        assert transport.disconnected
        assert closed == []
        protocol.connectionLost(Failure(ConnectionDone()))
        assert closed == [None]
        assert len(played.reasons) == 1
        assert played.reactor.getDelayedCalls() == []


class TestAnswers:
    """Those that are none."""

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            (b"-LOADING Redis is loading the dataset in memory\r\n", "LOADING Redis is loading the dataset in memory"),
            (b"-MOVED 3999 127.0.0.1:6381\r\n", "MOVED 3999 127.0.0.1:6381"),
            (b"-ERR unknown command 'EVAL', with args beginning with: 'x'\r\n", "ERR unknown command 'EVAL'"),
        ],
    )
    def test_errors(self, answer: bytes, reason: str) -> None:
        played = Played()
        played.ask()
        protocol, transport = played.connected()
        protocol.dataReceived(answer)
        assert played.reasons == [reason]
        assert not transport.disconnected

    @pytest.mark.parametrize(
        "answer", [b":1\r\n", b"+OK\r\n", b"*1\r\n:1\r\n", b"*3\r\n+a\r\n+b\r\n+c\r\n", b"*-1\r\n"]
    )
    def test_nonsense(self, answer: bytes) -> None:
        played = Played()
        played.ask()
        protocol, _ = played.connected()
        protocol.dataReceived(answer)
        assert len(played.reasons) == 1

    def test_a_password_is_not_repeated_with_what_the_server_says_of_it(self) -> None:
        played = Played(user="me", password=SECRET)
        played.ask()
        protocol, transport = played.accept()
        assert SECRET.encode() in transport.value()
        protocol.dataReceived(f"-ERR unknown command 'AUTH', with args beginning with: 'me' '{SECRET}'\r\n".encode())
        protocol.connectionLost(Failure(ConnectionDone()))
        assert "unknown command 'AUTH'" in played.reasons[0]
        assert SECRET not in played.reasons[0]
