"""The README tells the truth about settings and errors."""

from harness import HERE

from ai_ticket.settings import variables
from ai_ticket.web.faults import STATUSES
from ai_ticket.web.heads import MAX_HEAD_BYTES, MAX_HEAD_FIELDS
from ai_ticket.web.site import CLIENT_CLOSED_REQUEST

README = (HERE.parent / "README.md").read_text()


def test_every_setting_is_in_the_table_with_its_default() -> None:
    rows = {line.split("|")[1].strip(" `"): line for line in README.splitlines() if line.startswith("| `")}
    for variable in variables().values():
        row = rows[variable.name]
        default = variable.default
        if isinstance(default, bool):
            default = "on" if default else "off"
        elif isinstance(default, float):
            default = f"{default:g}"
        assert row.split("|")[2].strip(" `") == ("" if default is None else str(default)), variable.name
        assert row.split("|")[3].strip() == variable.help


def test_every_error_is_in_the_table_with_its_status() -> None:
    rows = [line for line in README.splitlines() if line.startswith("| ") and "`" in line]
    for code, status in STATUSES.items():
        assert any(f"`{code}`" in row and str(status) in row.split("|")[1] for row in rows), code


def test_the_statuses_that_are_no_code_of_their_own_are_told() -> None:
    limits = f"over {MAX_HEAD_BYTES // 1024} KiB or has more than {MAX_HEAD_FIELDS} fields"
    assert f"| 431 | `invalid_request` | the head is {limits} |" in README.splitlines()
    assert f"there is also {CLIENT_CLOSED_REQUEST}: the caller left" in README
