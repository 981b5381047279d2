"""The token file: one a line `token` or `name token`, each as itself or as `sha256:<hex>`; `#` starts a comment."""

import fcntl
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from msgspec import Struct

HASH_PREFIX = "sha256:"


class Entry(Struct, frozen=True):
    """One line: who, and the token or its hash."""

    name: str | None
    credential: str

    @property
    def is_hash(self) -> bool:
        """Whether the token itself is not there."""
        return self.credential.startswith(HASH_PREFIX)


def parse(line: str) -> Entry | None:
    """Read a line; None for a comment, a blank line or one that can't be read."""
    fields = line.split()
    if not fields or fields[0].startswith("#") or len(fields) > 2:
        return None
    return Entry(name=fields[0] if len(fields) == 2 else None, credential=fields[-1])


def entries(lines: Iterable[str]) -> list[Entry]:
    """All that the lines hold."""
    return [entry for entry in map(parse, lines) if entry is not None]


class NameTaken(Exception):
    """The file has a token under this name."""


def store(path: Path, entry: Entry, *, replace: bool) -> bool:
    """Put an entry into the file, at its end, or with `replace` where that name was; say whether it replaced one.

    Other lines stay as they are, and so do the file's mode and owner. A new file is its owner's alone. Readers see the
    old file or the new one, never a part.

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
        places = [number for number, line in enumerate(lines) if (old := parse(line)) and old.name == entry.name]
        if places and not replace:
            raise NameTaken(entry.name)
        line = f"{entry.name} {entry.credential}"
        if places:
            lines[places[0]] = line
            lines = [kept for number, kept in enumerate(lines) if number not in places[1:]]
        elif lines[-1]:  # the last line has no end
            lines += [line, ""]
        else:
            lines[-1:] = [line, ""]
        _write(path, "\n".join(lines), status)
    return bool(places)


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
