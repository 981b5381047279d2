"""The real daemon's log: nobody reads it, or a person does."""

import json
import os
import signal
import socket
from pathlib import Path

import pytest
from daemon import PATIENCE, Daemon, running, wait_until

pytestmark = pytest.mark.e2e


class Pipe:
    """The daemon's standard output, which is read when told to."""

    def __init__(self, folder: Path) -> None:
        path = folder / "out.log"
        os.mkfifo(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.data = b""

    def read(self) -> bytes:
        try:
            while found := os.read(self._fd, 65536):
                self.data += found
        except BlockingIOError:
            pass
        return self.data

    def close(self) -> None:
        os.close(self._fd)


def ask(daemon: Daemon, port: int, requests: int) -> None:
    """Requests on one connection, each of which is a line of the log."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection, connection.makefile("rb") as answers:
        for number in range(requests):
            connection.sendall(b"GET /nope HTTP/1.1\r\nHost: x\r\nX-Request-ID: r%0127d\r\n\r\n" % number)
            length = 0
            while (line := answers.readline()) not in (b"\r\n", b""):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            assert len(answers.read(length)) == length > 0


def test_a_reader_that_does_not_read_holds_nobody_up(tmp_path: Path) -> None:
    pipe = Pipe(tmp_path)
    with running(tmp_path, AI_TICKET_AUTH="off", KOBOLDCPP_API_URL="http://127.0.0.1:9") as daemon:
        wait_until(lambda: b"listening for metrics" in pipe.read(), "the start")
        lines = [json.loads(line) for line in pipe.data.splitlines()]
        [port] = [line["port"] for line in lines if line.get("endpoint") == "http"]
        ask(daemon, port, 3600)  # far more than pipe and backlog hold together
        wait_until(lambda: b"lines of the log were dropped" in pipe.read(), "what was dropped")
        ask(daemon, port, 1)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        lines = [json.loads(line) for line in pipe.read().splitlines()]
        numbers = [int(line["request_id"][1:]) for line in lines if line["message"] == "GET unmatched 404"]
        [dropped] = [line["dropped"] for line in lines if "dropped" in line]
        assert numbers[:-1] == list(range(len(numbers) - 1))
        assert len(numbers) + dropped >= 3601
        assert numbers[-1] == 0
        assert lines[-1]["message"] == "Server Shut Down."
    pipe.close()


def test_nor_does_it_hold_up_the_end(tmp_path: Path) -> None:
    pipe = Pipe(tmp_path)
    with running(tmp_path, AI_TICKET_AUTH="off", KOBOLDCPP_API_URL="http://127.0.0.1:9") as daemon:
        wait_until(lambda: b"listening for metrics" in pipe.read(), "the start")
        lines = [json.loads(line) for line in pipe.data.splitlines()]
        ask(daemon, next(line["port"] for line in lines if line.get("endpoint") == "http"), 1000)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
    pipe.close()


def test_text(tmp_path: Path) -> None:
    with running(tmp_path, AI_TICKET_AUTH="off", LOG_FORMAT="Text", KOBOLDCPP_API_URL="http://127.0.0.1:9") as daemon:
        wait_until(lambda: "is down" in daemon.out and "listening for metrics" in daemon.out, "the start")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert "WARN     backend 127.0.0.1:9 is down: " in daemon.out
        assert "starting on" not in daemon.out
        assert "\x1b" not in daemon.out
        assert daemon.out.splitlines()[-1].split()[1:5] == ["INFO", "Server", "Shut", "Down."]


def test_a_form_that_is_none_stops_the_start(tmp_path: Path) -> None:
    with running(tmp_path, AI_TICKET_AUTH="off", LOG_FORMAT="xml", LOG_PAYLOADS="sample") as daemon:
        assert daemon.wait() == 1
        assert daemon.err.splitlines() == [
            "ai-ticket: LOG_FORMAT='xml': must be one of json, text",
            "ai-ticket: LOG_PAYLOADS='sample': must be off, or sample:N with N from 1 to 9999 payloads a minute",
        ]
