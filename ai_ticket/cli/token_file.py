"""The token file as `ai-ticket token` writes it: what else stands there, and can perhaps not be read, stays."""

import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from msgspec.structs import replace as with_fields

from ai_ticket.tokens import Line, read_line


def parse(line: str) -> Line | None:
    """Read a line; None for a comment, a blank line or one that can't be read, which is the service's to judge."""
    with suppress(ValueError):
        return read_line(line)
    return None


def lines_of(text: str) -> list[Line]:
    """All that a token file holds."""
    return [line for line in map(parse, text.split("\n")) if line is not None]


class NameTaken(Exception):
    """The file has a token under this name."""


def store(path: Path, new: Line, *, replace: bool) -> bool:
    """Put a line into the file, at its end, or with `replace` where that name was; say whether it replaced one.

    What takes another's place has its weight too, unless it brings one. Other lines stay as they are, and so do the
    file's mode and owner. A new file is its owner's alone. Readers see the old file or the new one, never a part.

    @raise NameTaken: the name is there and may not be replaced. @raise OSError: the file can't be written.
    """
    path = Path(os.path.realpath(path))  # what a link leads to is replaced, not the link
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(path.parent):
        try:
            content, status = _read(path)
        except FileNotFoundError:
            content, status = "", None
        # Not splitlines(), which knows more line ends than a file with one entry a line has.
        lines = content.split("\n")
        known = {number: line for number, text in enumerate(lines) if (line := parse(text)) and line.name == new.name}
        if known and not replace:
            raise NameTaken(new.name)
        if known:
            place, old = next(iter(known.items()))
            lines[place] = with_fields(new, parameters=new.parameters or old.parameters).text
            lines = [text for number, text in enumerate(lines) if number == place or number not in known]
        elif lines[-1]:  # the last line has no end
            lines += [new.text, ""]
        else:
            lines[-1:] = [new.text, ""]
        _write(path, "\n".join(lines), status)
    return bool(known)


def _read(path: Path) -> tuple[str, os.stat_result]:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        # What is not UTF-8 is not ours to judge here, only to keep.
        return file.read().decode("utf-8", "surrogateescape"), status


def _write(path: Path, content: str, old: os.stat_result | None) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with open(descriptor, "wb") as file:
            file.write(content.encode("utf-8", "surrogateescape"))
            if old is not None:
                new = os.fstat(descriptor)
                if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
                    os.fchown(descriptor, old.st_uid, old.st_gid)
                os.fchmod(descriptor, stat.S_IMODE(old.st_mode))  # after the owner: nobody else ever sees more
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one writer at a time in, so that none loses another's line."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # some network file systems can't lock a folder; writing is atomic there all the same
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
