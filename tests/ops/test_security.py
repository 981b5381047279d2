"""SECURITY.md: what it names is there, and the numbers in it are those of the code."""

import re
from pathlib import Path

import pytest

from ai_ticket.environment import FILE_TWINS
from ai_ticket.settings import variables
from ai_ticket.web.auth import INVALID_TOKENS, INVALID_TOKENS_SECONDS
from ai_ticket.web.heads import MAX_HEAD_BYTES, MAX_HEAD_FIELDS
from ai_ticket.web.http2_state import MAX_CONCURRENT_STREAMS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"`([^`\n]+)`", TEXT)


@pytest.mark.parametrize(
    "name", sorted({each for quoted in QUOTED for each in re.findall(r"^[A-Z][A-Z_]{3,}\b", quoted)})
)
def test_names_only_settings_that_there_are(name: str) -> None:
    assert name in {*variables(), *FILE_TWINS}


@pytest.mark.parametrize(
    "path", sorted({each for each in QUOTED if re.fullmatch(r"(ops|tests)/[\w./-]+|setup\.py", each)})
)
def test_names_only_files_that_there_are(path: str) -> None:
    assert (ROOT / path).exists()


def test_says_the_numbers_of_the_code() -> None:
    text = " ".join(TEXT.split())
    assert f"heads of up to {MAX_HEAD_BYTES // 1024} KiB and {MAX_HEAD_FIELDS} fields" in text
    assert f"{MAX_CONCURRENT_STREAMS} streams of an HTTP/2 connection" in text
    assert (INVALID_TOKENS, INVALID_TOKENS_SECONDS) == (10, 60.0), "ten wrong tokens a minute"
    assert "Ten wrong tokens a minute" in text


def test_has_no_address_to_write_to() -> None:
    assert "@" not in TEXT
    assert "://" not in re.sub(r"`https?://`", "", TEXT)
