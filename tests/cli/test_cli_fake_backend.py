"""`ai-ticket fake-backend`, as a process of its own."""

import json
import signal
import socket
import urllib.request
from urllib.error import HTTPError

import pytest

from ai_ticket.cli import main


@pytest.fixture
def serve(start):
    """Starts it on a port that is free, and gives the process and its address."""

    def serve(*options):
        process = start("fake-backend", "--port", "0", *options)
        return process, process.stdout.readline().decode().strip()

    return serve


def ask(url, path, fields=None, **headers):
    data = None if fields is None else json.dumps(fields).encode()
    with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=10) as response:
        return json.load(response)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_serves_until_it_is_interrupted(number, status, serve):
    """Also while it generates, and without a traceback."""
    process, url = serve("--tokens-per-second", "1")
    assert url.startswith("http://127.0.0.1:")
    assert ask(url, "/api/extra/version")["version"] == "1.115.1"
    body = b'{"prompt": "hi", "stream": true}'
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as caller:
        caller.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        assert caller.recv(100).startswith(b"HTTP/1.0 200 OK\r\n")
        process.send_signal(number)
        out, err = process.communicate()
    assert (process.returncode, out) == (status, b"")
    assert err.decode() == "A fake KoboldCPP is listening there; Ctrl-C ends it.\n"


def test_its_options(serve):
    options = "--tokens-per-second inf --first-token-seconds 0.1 --context 4096 --multiuser 0 --password sesame --echo"
    _, url = serve(*options.split(), "--host", "127.0.0.1")
    assert ask(url, "/api/extra/true_max_context_length") == {"value": 4096}
    event = {"messages": [{"role": "user", "content": "Say this."}]}
    with pytest.raises(HTTPError, match="401"):
        ask(url, "/v1/chat/completions", event)
    answer = ask(url, "/v1/chat/completions", event, Authorization="Bearer sesame")
    assert answer["choices"][0]["message"]["content"] == "Say this."
    assert ask(url, "/api/extra/perf")["last_process_time"] == 0.1


def test_a_text_of_its_own(serve):
    _, url = serve("--text", "Nothing.")
    assert ask(url, "/v1/completions", {"prompt": "hi"})["choices"][0]["text"] == "Nothing."


def test_idle_connections_pin_its_threads(serve):
    """Whoever comes too late is connected, and then hears nothing."""
    _, url = serve()
    host, port = url.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port)), timeout=10) for _ in range(24)]
    with socket.create_connection((host, int(port)), timeout=0.3) as late:
        late.sendall(b"GET /ping HTTP/1.1\r\n\r\n")
        with pytest.raises(TimeoutError):
            late.recv(1)
        idle.pop().close()
        late.settimeout(10)
        assert late.recv(100).startswith(b"HTTP/1.0 200 OK\r\n")
    for connection in idle:
        connection.close()


def test_a_port_in_use(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = start("fake-backend", "--port", port)
        out, err = process.communicate()
    assert (process.returncode, out) == (1, b"")
    assert err.decode() == f"error: cannot_listen: Can't listen on 127.0.0.1, port {port}: Address already in use.\n"


def test_its_help(capsys):
    with pytest.raises(SystemExit):
        main(["fake-backend", "--help"])
    assert "KOBOLDCPP_API_URL=http://127.0.0.1:5001" in capsys.readouterr().out
