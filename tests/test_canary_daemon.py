"""A token in all the wrong places, a prompt and a completion: none of them is in anything that the service puts out."""

import base64
import signal
import socket
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from daemon import PATIENCE, Daemon, model_server, running, wait_until
from fuzz import http2
from hpack import Encoder

pytestmark = pytest.mark.e2e

TOKEN = "Canary.token-a7Q"
WRONG = "Canary.wrong-b8R"
PROMPT = "canary prompt c9S"
SYSTEM = "canary instruction d1T"
SECRETS = (TOKEN, WRONG, PROMPT, SYSTEM)
EVENT = '{"content": {"messages": [{"role": "system", "content": "%s"}, {"role": "user", "content": "%s"}]}}'
BODY = (EVENT % (SYSTEM, PROMPT)).encode()


def heads(token: str) -> Iterator[bytes]:
    """Requests of HTTP/1.1 with the token where it does not belong, a few of them no requests at all."""
    post = "POST /event HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    basic = base64.b64encode(f"user:{token}".encode()).decode()
    fields = [
        f"Authorization: {token}",
        f"Authorization: Basic {basic}",
        f"Authorization: Bearer Bearer {token}",
        f"Authorization: Bearer\t{token} {token}",
        f"Authorization: Token {token}",
        f"X-API-Key: Bearer {token}",
        f"X-API-Key: {token}, {token}",
        f"X-API-Key: '{token}'",
        f"Cookie: token={token}",
        f"{token}: {token}",
        f"X-Request-ID: /{token}",
        f"X-Forwarded-For: {token}",
        f"traceparent: {token}",
        f"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\ntracestate: a={token}",
        f"Content-Type: {token}",
        f"Accept: {token}",
        f"Expect: {token}",
        f"Transfer-Encoding: {token}",
        f"Content-Length: {token}",
        f"Connection: {token}",
        f"Upgrade: {token}\r\nConnection: upgrade",
        f"Host: {token}",
        f"{token}",
        f"X\0: {token}",
        f"X: \x01{token}",
    ]
    yield f"{post}X-API-Key: {token}\r\nX-Request-ID: {token}\r\nContent-Length: 2\r\n\r\n{{}}".encode()
    for field in fields:
        for authorization in ("", f"X-API-Key: {token}\r\n"):
            yield f"{post}{authorization}Content-Length: {len(BODY)}\r\n{field}\r\n\r\n".encode() + BODY
    for line in (
        f"POST /{token} HTTP/1.1",
        f"POST /event?token={token} HTTP/1.1",
        f"POST http://user:{token}@x/event HTTP/1.1",
        f"{token} /event HTTP/1.1",
        f"POST /event {token}",
        f"POST /event HTTP/{token}",
        f"CONNECT {token}:443 HTTP/1.1",
        f"OPTIONS * HTTP/1.1\r\nX: {token}",
        f"TRACE /event HTTP/1.1\r\nX: {token}",
        token,
    ):
        yield f"{line}\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
    ok = f"{post}Authorization: Bearer {token}\r\n"
    for body in (
        f'"{token}"',
        f'["{token}"]',
        f"{{{token}",
        f'{{"{token}": 1}}',
        f'{{"content": 7, "{token}": "{token}"}}',
    ):
        yield f"{ok}Content-Length: {len(body)}\r\n\r\n{body}".encode()
    for parameters in (f'{{"{token}": 1}}', f'{{"stop": "{token}", "seed": "{token}"}}', f'"{token}"'):
        body = f'{{"content": "{PROMPT}", "parameters": {parameters}}}'
        yield f"{ok}Content-Length: {len(body)}\r\n\r\n{body}".encode()
    yield f"{ok}Transfer-Encoding: chunked\r\n\r\n{token}\r\n\r\n".encode()
    yield f"{ok}Transfer-Encoding: chunked\r\n\r\n1;a={token}\r\n{{\r\n0\r\n{token}: {token}\r\n\r\n".encode()


def frames(token: str) -> Iterator[bytes]:
    """Connections of HTTP/2 likewise."""
    usual = {
        ":method": "POST",
        ":scheme": "https",
        ":path": "/event",
        ":authority": "x",
        "authorization": f"Bearer {token}",
    }
    opening = http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0)
    for name in usual:
        yield opening + http2.frame(http2.HEADERS, 5, 1, Encoder().encode([*(usual | {name: token}).items()]))
    for field in (
        ("x-request-id", token),
        (token, token),
        (":status", token),
        ("x", f"\n{token}"),
        ("te", token),
        ("content-length", token),
    ):
        yield opening + http2.frame(http2.HEADERS, 5, 1, Encoder().encode([*usual.items(), field]))
    yield opening + http2.frame(http2.GOAWAY, 0, 0, bytes(8) + token.encode())
    yield opening + http2.frame(http2.HEADERS, 5, 1, b"\x40\x7f" + token.encode())
    yield token.encode()


def send(port: int, data: bytes, context: ssl.SSLContext | None = None, name: str = "localhost") -> bytes:
    """What comes back, until there is no more, or for a moment."""
    found = b""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as plain:
        try:
            connection = plain if context is None else context.wrap_socket(plain, server_hostname=name)
            connection.settimeout(2.0)
            connection.sendall(data)
            while piece := connection.recv(65_536):
                found += piece
                connection.settimeout(0.1)
        except OSError:
            pass
    return found


def secure(daemon: Daemon, *protocols: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(daemon.certificates.ca))
    context.check_hostname = False
    context.set_alpn_protocols(list(protocols))
    return context


def test_no_output_has_a_token_a_prompt_or_a_completion(tmp_path: Path) -> None:
    """At DEBUG, with every span on standard error; nor do the arguments and the name of the process."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"caller {TOKEN}\n")
    tokens.chmod(0o600)
    with (
        model_server() as server,
        running(
            tmp_path,
            KOBOLDCPP_API_URL=server.url,
            AI_TICKET_AUTH_TOKEN="",
            AI_TICKET_AUTH_TOKEN_FILE=str(tokens),
            LOG_LEVEL="DEBUG",
        ) as daemon,
    ):
        daemon.ready()
        plain, tls = daemon.port("http"), daemon.port("https")
        with ThreadPoolExecutor(16) as pool:
            answers = b"".join(pool.map(lambda head: send(plain, head), [*heads(TOKEN), *heads(WRONG)]))
            assert answers.count(b"HTTP/1.1 200 ") >= 10, "some are well-formed"
            list(pool.map(lambda data: send(tls, data, secure(daemon, "h2")), [*frames(TOKEN), *frames(WRONG)]))
        for token in (TOKEN, WRONG):
            # What is not TLS on the port that is, what is on the one that is not, and what only the handshake has.
            send(tls, next(heads(token)))
            send(plain, b"", secure(daemon, token), f"{token}.example")
            send(tls, b"", secure(daemon, token), f"{token}.example")
        with daemon.client(http2=True) as client:
            headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
            assert PROMPT in client.post("/event", content=BODY, headers=headers).text, "the model server echoes it"
            lines = client.post("/events", content=BODY, headers={**headers, "Content-Type": "application/x-ndjson"})
            assert PROMPT in lines.text
        tokens.write_text(f"caller {TOKEN} {WRONG}\n")
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: daemon.logged("can't be used"), "the complaint about a malformed line")
        metrics = httpx.get(f"http://127.0.0.1:{daemon.port('metrics')}/metrics", trust_env=False).text
        process = Path(f"/proc/{daemon.process.pid}")
        names = [(process / name).read_bytes().decode(errors="replace") for name in ("cmdline", "comm", "status")]
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        told = {"log": daemon.out, "errors": daemon.err, "metrics": metrics, "process": " ".join(names)}
    assert '"DEBUG"' in told["log"]
    assert told["errors"].count("kobold.get_completion") >= 10, "spans are written there"
    found = [(where, secret) for where, text in told.items() for secret in SECRETS if secret.lower() in text.lower()]
    basic = base64.b64encode(f"user:{TOKEN}".encode()).decode()
    assert found == []
    assert [where for where, text in told.items() if basic in text] == []


def test_a_sample_of_payloads_hides_what_looks_like_a_credential(tmp_path: Path) -> None:
    secrets = [f"sk-{TOKEN}", f"password={TOKEN}", f"Authorization: Bearer {TOKEN}", f"https://user:{TOKEN}@host/"]
    with (
        model_server() as server,
        running(
            tmp_path,
            KOBOLDCPP_API_URL=server.url,
            AI_TICKET_AUTH_TOKEN=TOKEN,
            LOG_LEVEL="DEBUG",
            LOG_PAYLOADS="sample:1000",
            OTEL_TRACES_EXPORTER="none",
        ) as daemon,
        daemon.ready().client() as client,
    ):
        for secret in secrets:
            event = {"content": f"What is wrong with {secret} ?", "api_key": TOKEN}
            assert client.post("/event", json=event, headers={"X-API-Key": TOKEN}).status_code == 200
        wait_until(lambda: daemon.out.count("What is wrong with") == len(secrets), "the payloads")
        assert TOKEN not in daemon.out + daemon.err
