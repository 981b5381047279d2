"""What lies beside the package and must keep step with it: the sample settings, the scripts, the metadata."""

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import msgspec
import pytest

from ai_ticket import __version__
from ai_ticket.environment import FILE_TWINS, load
from ai_ticket.settings import DEFAULTS, variables

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "etc" / "ai-ticket.env"
SCRIPTS = [*sorted(ROOT.glob("ops/**/*.sh")), ROOT / ".ci" / "run"]


def sample_values() -> dict[str, str]:
    """The commented-out settings of the sample file, by name."""
    return dict(re.findall(r"^#([A-Z0-9_]+)=(.*)$", SAMPLE.read_text(encoding="utf-8"), re.MULTILINE))


def plain_name(distribution: str) -> str:
    """The name of a distribution as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def imported() -> list[str]:
    """The top-level modules that the package imports, Python's own and ours left out."""
    modules = set()
    for path in [*ROOT.glob("ai_ticket/**/*.py"), *ROOT.glob("twisted/plugins/*.py"), *ROOT.glob("*.tac")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module.partition(".")[0])
    return sorted(modules - sys.stdlib_module_names - {"ai_ticket"})


class TestSampleFile:
    """`etc/ai-ticket.env`."""

    def test_has_every_variable_in_the_order_of_the_settings(self) -> None:
        assert list(sample_values()) == list(variables())

    def test_shows_the_real_defaults(self, tmp_path: Path) -> None:
        """Read with every # taken away, it gives the default settings, and nothing to warn of."""
        copy = tmp_path / "all.env"
        copy.write_text("".join(f"{name}={value}\n" for name, value in sample_values().items()), encoding="utf-8")

        loaded = load({"AI_TICKET_ENV_FILE": str(copy), "AI_TICKET_AUTH_TOKEN": "token"})

        assert loaded.settings == msgspec.structs.replace(DEFAULTS, ai_ticket_auth_token="token")
        assert loaded.warnings == []

    def test_shows_a_default_wherever_there_is_one(self) -> None:
        without = [name for name, value in sample_values().items() if not value]

        assert without == [name for name, variable in variables().items() if variable.default in (None, "")]

    def test_says_something_of_each_group_and_sets_nothing(self) -> None:
        blocks = SAMPLE.read_text(encoding="utf-8").strip().split("\n\n")

        assert [block for block in blocks if not block.startswith("# ")] == []
        assert [block for block in blocks for line in block.splitlines() if not line.startswith("#")] == []

    @pytest.mark.parametrize("twin", FILE_TWINS)
    def test_names_the_variables_that_name_files_instead(self, twin: str) -> None:
        assert twin in SAMPLE.read_text(encoding="utf-8")


class TestScripts:
    """The shell scripts of the checkout."""

    @pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
    def test_can_be_read_by_bash_and_run(self, script: Path) -> None:
        subprocess.run(["bash", "-n", script], check=True)
        assert script.stat().st_mode & 0o111


class TestMetadata:
    """What `setup.py` says."""

    def test_the_version_can_be_read_without_importing_the_package(self) -> None:
        text = (ROOT / "ai_ticket" / "__init__.py").read_text(encoding="utf-8")

        assert re.findall(r'^__version__ = "([^"]+)"$', text, re.MULTILINE) == [__version__]

    def test_everything_that_is_imported_is_required(self) -> None:
        text = (ROOT / "setup.py").read_text(encoding="utf-8")
        required = {plain_name(name) for name in re.findall(r'^ +.*"([\w.-]+)(?:\[[\w,]+\])?>=', text, re.MULTILINE)}
        packages = packages_distributions()

        missing = [
            module for module in imported() if required.isdisjoint(map(plain_name, packages.get(module, [module])))
        ]

        assert missing == []

    def test_nothing_hides_twisted(self) -> None:
        """An `__init__.py` there would make the folder a package, found before the real one."""
        assert not (ROOT / "twisted" / "__init__.py").exists()
        assert not (ROOT / "twisted" / "plugins" / "__init__.py").exists()

    def test_the_package_tells_type_checkers_that_it_is_typed(self) -> None:
        assert (ROOT / "ai_ticket" / "py.typed").exists()
