"""The program of the child process that serves a model: llama.cpp's server, which ends when its parent does.

    python -m ai_ticket.backend.llama_child

It reads one line of JSON from stdin, a `ServerConfig`: the key is in it, and neither a command line nor the environment
is a place for that. When the model is loaded, it writes one line to stdout, a `Ready`. llama.cpp's log goes to stderr.
It ends at once at the end of stdin, with status 0; with status 1, having said why on stderr, if it can't serve.
"""

import ctypes
import os
import signal
import sys
from typing import Any

import msgspec
from msgspec import Struct

_PR_SET_PDEATHSIG = 1
_WARNINGS = 2  # llama.cpp's verbosity; what it refuses may be quoted in its warnings, but no prompt


class ServerConfig(Struct, frozen=True):
    """What to serve, and for whom.

    `context_length` is in tokens, for each of the `slots`; llama.cpp lowers it to what the model was trained for.
    `parent_pid` is the process whose end is ours too.
    """

    model_path: str
    model_name: str
    api_key: str
    slots: int
    context_length: int
    parent_pid: int


class Ready(Struct, frozen=True):
    """The server answers on this port of 127.0.0.1."""

    port: int


def main() -> None:
    """Serve until the end of stdin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal; the parent ends us in its order
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler of Python's would wait for the model to be loaded
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing but our answer is to be read on the real stdout, whatever a library prints
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        return
    config = msgspec.json.decode(line, type=ServerConfig)
    _end_with(config.parent_pid)
    server = _serve(config)
    with answer:
        answer.write(msgspec.json.encode(Ready(port=int(server.listening_address.rpartition(":")[2]))) + b"\n")
    for _ in sys.stdin.buffer:
        pass
    os._exit(0)  # there is nothing to save, and the parent that wants the memory back is not to wait for more


def _end_with(parent_pid: int) -> None:
    """Have the kernel kill this process together with its parent.

    The end of stdin says the same, but xllamacpp holds the interpreter's lock for as long as it loads the model, and no
    thread of Python's can look meanwhile. What counts, strictly, is the end of the parent's thread that started us: the
    reactor's, which is its main one.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before it could be watched
        os._exit(0)


def _serve(config: ServerConfig) -> Any:
    """Load the model and serve it, from threads of llama.cpp's own, for as long as what is returned is kept."""
    import xllamacpp  # noqa: PLC0415 - the parent imports this module too, and is to stay small

    params = xllamacpp.CommonParams()
    params.model.path = config.model_path
    params.model_alias = {config.model_name}
    params.api_keys = [config.api_key]
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_batch = params.n_ubatch = 128  # between batches it looks whether its caller has left
    params.n_parallel = config.slots
    params.n_ctx = config.slots * config.context_length  # split over the slots
    params.cpuparams.n_threads = _threads()
    # A slot goes on from the prompt that it had last. Keeping older ones as well costs up to 8 GiB, if left alone.
    params.cache_ram_mib = 0
    params.cache_idle_slots = False
    params.ui = False
    params.endpoint_slots = False
    params.endpoint_metrics = False
    params.verbosity = _WARNINGS
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        sys.exit(f"llama.cpp's server did not start: {error}")


def _threads() -> int:
    """As many as there are processors for us, up to eight: beyond that, what generation waits for is the memory."""
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(usable, 8)


if __name__ == "__main__":
    main()
