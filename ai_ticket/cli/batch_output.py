"""The answers of a batch: one line for each event, kept so that a run can be killed at any moment and resumed."""

import fcntl
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec import Struct

from ai_ticket.cli import console
from ai_ticket.cli.batch_input import Survey
from ai_ticket.cli.body import Fields
from ai_ticket.cli.outcome import CommandError, ExitStatus

_START_ANEW = "--overwrite starts anew"


class Done:
    """Which lines of the input have an answer, a bit for each, and how many of the answers are errors."""

    def __init__(self, lines: int = 0):
        self._bits = bytearray((lines + 7) // 8)
        self.count = 0
        self.failed = 0

    def __contains__(self, number: int) -> bool:
        byte = number >> 3
        return byte < len(self._bits) and bool(self._bits[byte] & (1 << (number & 7)))

    def add(self, number: int, status: int) -> None:
        """It has an answer with this status."""
        self._bits[number >> 3] |= 1 << (number & 7)
        self.count += 1
        self.failed += status != 200


class Output:
    """Takes answers. `done` says which there were before; `resumable`, whether there will be a next time."""

    def __init__(self, write: Callable[[bytes], None], close: Callable[[], None], done: Done, *, resumable: bool):
        self._write = write
        self.close = close
        self.done = done
        self.resumable = resumable

    def write(self, result: Fields) -> None:
        """Write an answer, for good: what happens to this process later can't undo it.

        @raise OSError: it can't be written, or not all of it; then nothing more may be.
        """
        self._write(msgspec.json.encode(result) + b"\n")


def open_output(name: str, surveyed: Survey | None, *, overwrite: bool, retry_failed: bool) -> Output:
    """Open what answers are written to, and read what it has of an earlier run.

    @param surveyed: the input; None where it can't be read twice.
    @param retry_failed: the errors among the answers are taken out, as if those events had none yet.
    @raise CommandError: another run is writing to it, or what it has are not answers to this input.
    @raise OSError: it can't be read or written.
    """
    if name == "-" or (os.path.exists(name) and not os.path.isfile(name)):
        if overwrite or retry_failed:
            raise _usage("--overwrite and --retry-failed are for an OUTPUT that is a file")
        return _stream(name)
    if surveyed is None and retry_failed:
        raise _usage("--retry-failed is for an INPUT that is a file")
    path = Path(os.path.realpath(name))
    state_path = path.with_name(f"{path.name}.state")
    has_answers = path.exists() and path.stat().st_size > 0
    if has_answers and not overwrite and not state_path.exists():
        raise CommandError("output_exists", f"{name} exists, and is not of an earlier run.", details=_START_ANEW)
    state = os.open(state_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _lock(state, name)
        # Only now: another run may have ended, or begun, in between.
        if overwrite or not path.exists() or path.stat().st_size == 0:
            return _start(path, state, surveyed)
        return _resume(name, path, state, surveyed, retry_failed=retry_failed)
    except BaseException:
        os.close(state)
        raise


def _stream(name: str) -> Output:
    if name == "-" and sys.stdout.isatty():
        return Output(lambda line: console.out(line.decode(), end=""), lambda: None, Done(), resumable=False)
    descriptor = os.dup(sys.stdout.fileno()) if name == "-" else os.open(name, os.O_WRONLY | os.O_CLOEXEC)
    return Output(_writer(descriptor), lambda: os.close(descriptor), Done(), resumable=False)


def _start(path: Path, state: int, surveyed: Survey | None) -> Output:
    # In this order: a state without answers is no state.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o666)
    os.ftruncate(state, 0)
    os.pwrite(state, msgspec.json.encode(surveyed) + b"\n", 0)
    return _file(descriptor, state, Done(), resumable=surveyed is not None)


def _resume(name: str, path: Path, state: int, surveyed: Survey | None, *, retry_failed: bool) -> Output:
    if surveyed is None:
        raise CommandError("output_exists", f"{name} exists, and a pipe can't be resumed.", details=_START_ANEW)
    try:
        before = msgspec.json.decode(os.pread(state, 1024, 0), type=Survey | None)
    except msgspec.DecodeError:
        before = None
    if before != surveyed:
        raise CommandError("other_input", f"{name} has the answers to another input.", details=_START_ANEW)
    done = Done(surveyed.lines)
    with path.open("rb+") as file:
        end = 0
        for line, result in _results(file, name, surveyed.lines):
            end += len(line)
            if not (retry_failed and result.status != 200):
                done.add(result.index, result.status)
        file.truncate(end)
        if retry_failed:
            _leave_out_failed(file, path, name, surveyed.lines)
    return _file(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC), state, done, resumable=True)


class _Result(Struct):
    """What must be known of a line of the output."""

    index: int
    status: int


def _results(file: BinaryIO, name: str, lines: int) -> Iterator[tuple[bytes, _Result]]:
    """The whole lines of an output; a last one without a line end was not written to its end."""
    decoder = msgspec.json.Decoder(_Result)
    file.seek(0)
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            return
        try:
            result = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            result = _Result(index=-1, status=0)
        if not 0 <= result.index < lines:
            message = f"Line {number} of {name} is no answer to this input."
            raise CommandError("output_damaged", message, details=_START_ANEW)
        yield line, result


def _leave_out_failed(file: BinaryIO, path: Path, name: str, lines: int) -> None:
    """Replace the output by one that lacks them; whoever looks sees the one or the other."""
    without = path.with_name(f"{path.name}.new")  # nobody else's, as we have the lock
    with without.open("wb") as kept:
        os.fchmod(kept.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode))
        kept.writelines(line for line, result in _results(file, name, lines) if result.status == 200)
        kept.flush()
        os.fsync(kept.fileno())
    os.replace(without, path)


def _file(descriptor: int, state: int, done: Done, *, resumable: bool) -> Output:
    def close() -> None:
        os.close(descriptor)
        os.close(state)  # and with it goes the lock

    return Output(_writer(descriptor), close, done, resumable=resumable)


def _writer(descriptor: int) -> Callable[[bytes], None]:
    def write(line: bytes) -> None:
        rest = memoryview(line)
        while rest:  # unbuffered, so that no answer is only in our memory
            rest = rest[os.write(descriptor, rest) :]

    return write


def _lock(state: int, name: str) -> None:
    try:
        fcntl.flock(state, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CommandError("output_in_use", f"Another run is writing to {name}.")
    except OSError:  # some network file systems have no locks
        console.warn(f"{name} can't be locked: let there be one run at a time")


def _usage(message: str) -> CommandError:
    return CommandError("usage", message, status=ExitStatus.USAGE)
