"""Figures out of measurements. Pure."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median


def percentile(values: Sequence[float], share: float) -> float:
    """The least of the values that at least this share of them do not exceed; NaN of none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def middle(values: Sequence[float]) -> float:
    """The median of those that are numbers; NaN of none."""
    known = [value for value in values if not math.isnan(value)]
    return median(known) if known else math.nan


def ratio(own: Sequence[float], base: Sequence[float]) -> float:
    """The median over the rounds of how many times the base's figure of the same round this is."""
    return middle([one / other if other else math.nan for one, other in zip(own, base, strict=True)])


def difference(own: Sequence[float], base: Sequence[float]) -> float:
    """The median over the rounds of what this is more than the base's figure of the same round."""
    return middle([one - other for one, other in zip(own, base, strict=True)])


@dataclass
class Round:
    """What was measured of one row in one round; NaN for what was not.

    `cpu` in seconds for a request, or for a token of a stream. `p50`, `p99` in seconds: of answers to one caller at a
    time; of first tokens for streams. `busy_p99`: of answers with all callers at it. `jitter`: 99 % are below.
    `resident` in bytes afterwards; `each` in bytes a stream. `errors` by their kind.
    """

    rate: float = math.nan
    cpu: float = math.nan
    p50: float = math.nan
    p99: float = math.nan
    busy_p99: float = math.nan
    jitter: float = math.nan
    resident: float = math.nan
    each: float = math.nan
    count: int = 0
    errors: dict[str, int] = field(default_factory=dict)

    def plain(self) -> dict[str, object]:
        """For JSON, which has no NaN."""
        return {name: None if value != value else value for name, value in asdict(self).items()}  # noqa: PLR0124


@dataclass
class Figures:
    """What a row comes to over all rounds; units as in `Round`, times of answers less the model server's own."""

    rate: float
    cpu: float
    times_cpu: float
    times_rate: float
    p50: float
    p99: float
    jitter: float
    resident: float
    each: float
    errors: int


def summary(own: Sequence[Round], base: Sequence[Round], direct: Sequence[Round]) -> Figures:
    """A row's figures: against the base's and the model server's own in the same rounds."""

    def of(name: str, rounds: Sequence[Round] = own) -> list[float]:
        return [getattr(one, name) for one in rounds]

    each = [value for value in of("each") if not math.isnan(value)]
    return Figures(
        rate=middle(of("rate")),
        cpu=middle(of("cpu")),
        times_cpu=ratio(of("cpu"), of("cpu", base)),
        times_rate=ratio(of("rate"), of("rate", base)),
        p50=difference(of("p50"), of("p50", direct)),
        p99=difference(of("p99"), of("p99", direct)),
        jitter=middle(of("jitter")),
        resident=middle(of("resident")),
        each=each[0] if each else math.nan,  # later rounds find the memory that the first one took
        errors=sum(sum(one.errors.values()) for one in own),
    )


def number(value: float, digits: int = 2) -> str:
    """A number for the table; a dash for none."""
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"


Column = tuple[str, Callable[[Figures], str]]


def table(rows: Sequence[tuple[str, Figures]], columns: Sequence[Column]) -> str:
    """Lines of aligned columns, the rows' names first."""
    cells = [["", *(title for title, _ in columns)]]
    cells += [[name, *(show(figures) for _, show in columns)] for name, figures in rows]
    widths = [max(len(row[place]) for row in cells) for place in range(len(cells[0]))]
    lines = []
    for name, *rest in cells:
        shown = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *shown]).rstrip())
    return "\n".join(lines)
