"""What twistd was asked to do with the log, and does not do where a service brings a log of its own, as ours does.

And how its process ends in time: Twisted waits for its threads, and there is no way to stop one that waits itself.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from getopt import GetoptError, getopt
from typing import Any

from twisted.python.usage import Options

from ai_ticket.environment import ConfigurationError
from ai_ticket.telemetry.logs_output import Descriptor

DEFAULT_LOG_FILE = "twistd.log"
"""Of a daemon, in the folder where it was started, as for every service under twistd."""


def log_file(options: Options, argv: Sequence[str]) -> Descriptor | None:
    """The file that the log goes to, opened; None: standard output.

    @param options: those of the plugin, or none where a .tac file was run. @param argv: the command line.
    @raise ConfigurationError: it can't go where it was asked to.
    """
    asked = _asked(options, argv)
    if asked.get("syslog"):
        raise ConfigurationError(["--syslog: the log goes to standard output, or to the file that --logfile names"])
    path = asked.get("logfile")
    if asked.get("nodaemon") or asked.get("debug"):
        if path in (None, "", "-"):
            return None
    elif path == "-":
        raise ConfigurationError(["--logfile=-: a daemon has no standard output; name a file, or add --nodaemon"])
    path = os.path.abspath(path or DEFAULT_LOG_FILE)
    try:
        return Descriptor(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640))
    except OSError as error:
        raise ConfigurationError([f"--logfile={path!r}: {error.strerror}"])


def _asked(options: Options, argv: Sequence[str]) -> Mapping[Any, Any]:
    """twistd's own options. It hands them to a plugin; a .tac file has to look for itself."""
    if options.parent is not None:
        # Another program that runs plugins has other options, and makes no daemon of them.
        return options.parent if "nodaemon" in options.parent else _FOREGROUND
    if not argv or not os.path.basename(argv[0]).startswith("twistd"):
        return _FOREGROUND
    # twistd has it already, others do not need it.
    from twisted.scripts.twistd import ServerOptions  # type: ignore[attr-defined] # noqa: PLC0415

    known = ServerOptions()
    try:
        given, _ = getopt(list(argv[1:]), known.shortOpt, known.longOpt)
    except GetoptError:  # which twistd would not have let pass
        return _FOREGROUND
    return {known.synonyms.get(name.lstrip("-")): value or True for name, value in given}


_FOREGROUND = {"nodaemon": True}


def leave(seconds: float, last: Callable[[], object]) -> None:
    """Have the process end within so many seconds, with status 0, whatever its threads do; signals change nothing now.

    While Python ends it would give each signal back its default, which for most of them is to kill.

    @param last: what is to be done before, if the time is used up.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    def end() -> None:
        time.sleep(seconds)
        last()
        os._exit(0)

    threading.Thread(target=end, daemon=True).start()
