"""What the service is built of: versions without known advisories, and for the image none but those locked by hash."""

import ast
import re
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "ops" / "requirements.lock"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")

# The first version in which what is known of is mended. Each concerns how we use it, or might.
ADVISORIES = {
    "cryptography": ("46.0.6", "CVE-2026-34073: name constraints not applied to some certificates"),
    "h2": ("4.3.0", "CVE-2025-57804: header values with CR and LF, which split a request"),
    "idna": ("3.7", "CVE-2024-3651: a host name that takes quadratic time"),
    "protobuf": ("6.33.5", "CVE-2026-0994: recursion without bounds"),
    "pyopenssl": ("26.0.0", "CVE-2026-27448, CVE-2026-27459: a failing callback lets the handshake go on"),
    "python-dotenv": ("1.2.2", "CVE-2026-28684: follows symbolic links when it writes"),
    "setuptools": ("78.1.1", "CVE-2025-47273: a package that writes where it should not; builds our own"),
    "treq": ("22.1.0", "CVE-2022-23607: cookies of one host sent to another"),
    "twisted": ("26.4.0", "CVE-2026-42304, CVE-2024-41671: pipelined requests answered out of order"),
    "urllib3": ("2.7.0", "CVE-2026-44432, CVE-2026-44431: decompression without bounds, secrets sent on"),
}


def by_name(requirements: Iterable[str]) -> dict[str, Requirement]:
    found = [Requirement(each) for each in requirements]
    return {canonicalize_name(each.name): each for each in found}


def written(keyword: str) -> Any:
    """What `setup.py` says of itself under a keyword."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == keyword:
            return ast.literal_eval(node.value)
    raise AssertionError(keyword)


def lower_bound(requirement: Requirement) -> Version:
    [specifier] = requirement.specifier
    assert specifier.operator == ">="
    return Version(specifier.version)


def locked() -> dict[str, tuple[Version, list[str]]]:
    """What is locked: its version and its hashes."""
    found = {}
    for entry in re.split(r"\n(?=\S)", LOCK.read_text(encoding="utf-8").rstrip()):
        if not entry.startswith("#"):
            first, *hashes = entry.split(" \\\n    ")
            requirement = Requirement(first)
            [specifier] = requirement.specifier
            assert specifier.operator == "==", first
            found[canonicalize_name(requirement.name)] = Version(specifier.version), hashes
    return found


EXTRAS: dict[str, list[str]] = written("extras_require")
IN_THE_IMAGE = by_name([*written("install_requires"), *EXTRAS["redis"], *EXTRAS["local"]])
WRITTEN = by_name([*written("install_requires"), *(each for extra in EXTRAS.values() for each in extra)])
[BUILD] = by_name(
    tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
).values()


class TestBounds:
    def test_all_that_is_installed_satisfies_them(self) -> None:
        """A checkout that runs beside older packages would run what nobody has tested."""
        wrong = []
        for name, requirement in WRITTEN.items():
            try:
                installed = version(name)
            except PackageNotFoundError:  # an extra
                continue
            if installed not in requirement.specifier:
                wrong.append(f"{requirement}: {installed} is installed")
        assert wrong == []
        assert len(WRITTEN) > 25

    @pytest.mark.parametrize("name", ADVISORIES)
    def test_none_admits_a_version_with_a_known_advisory(self, name: str) -> None:
        mended, reason = ADVISORIES[name]
        requirement = BUILD if name == BUILD.name else WRITTEN.get(name)
        if requirement is not None:
            assert lower_bound(requirement) >= Version(mended), reason
        assert locked()[name][0] >= Version(mended), reason

    def test_nor_is_one_installed(self) -> None:
        """Also of what only others require. setuptools only builds: pip gets it anew for that."""
        for name, (mended, reason) in ADVISORIES.items():
            if name != BUILD.name:
                assert Version(version(name)) >= Version(mended), reason


class TestLock:
    def test_has_the_hashes_of_all(self) -> None:
        for name, (_, hashes) in locked().items():
            assert hashes, name
            assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes), name

    def test_satisfies_setup_py(self) -> None:
        """If not: `ops/lock.sh`."""
        for name, requirement in [*IN_THE_IMAGE.items(), (BUILD.name, BUILD)]:
            assert name in locked(), name
            assert locked()[name][0] in requirement.specifier, name

    def test_has_what_they_require_in_turn(self) -> None:
        """As far as it is installed here, so that all of it can be looked at."""
        missing = []
        for name in locked():
            try:
                theirs = requires(name) or []
            except PackageNotFoundError:
                continue
            extras = WRITTEN[name].extras if name in WRITTEN else set()
            for each in map(Requirement, theirs):
                wanted = each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in ["", *extras])
                if wanted and canonicalize_name(each.name) not in locked():
                    missing.append(f"{name} requires {each}")
        assert distribution("twisted").version
        assert missing == []

    def test_names_no_place_to_get_them_from(self) -> None:
        for line in LOCK.read_text(encoding="utf-8").splitlines()[1:]:
            assert re.match(r"[a-z0-9-]+(\[[a-z0-9, -]+\])?==|    --hash=", line), line
            assert not re.search(r"://|/| @ ", line), line

    def test_the_image_is_made_of_nothing_else(self) -> None:
        [download] = re.findall(r"pip download .*", DOCKERFILE)
        for option in ("--require-hashes", "--no-deps", "--only-binary :all:", "--requirement requirements.lock"):
            assert option in download
        [install] = re.findall(r"pip install .*", DOCKERFILE)
        assert "--no-index --find-links /wheels" in install
        assert "!ops/requirements.lock" in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
