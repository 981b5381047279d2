"""An HTTP server in threads of its own, for what is to be called over a real port."""

import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Answers(BaseHTTPRequestHandler):
    """What it answers; nothing of it is logged."""

    def log_message(self, *args: Any) -> None:
        pass


class ThreadedServer:
    """Serves on a `port` of its own until it is closed. An answer that waits for something must be let go before."""

    def __init__(self, answers: type[Answers], tls: ssl.SSLContext | None = None) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), answers)
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
