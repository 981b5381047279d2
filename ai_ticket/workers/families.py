"""Metrics of several processes as those of one service."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import Exemplar, Metric
from prometheus_client.samples import Sample as PrometheusSample

from ai_ticket.workers.messages import Family, Sample

_Key = tuple[str, tuple[tuple[str, str], ...]]

_OTHERWISE: Mapping[str, Callable[[float, float], float]] = {
    "build_info": max,
    "tls_certificate_expiry_timestamp_seconds": min,
    "process_start_time_seconds": min,
    "process_max_fds": min,
    "overload_level": max,
    "memory_limit_bytes": max,
}
"""Gauges that are not summed, by the ends of their names. What is open of the files of all is compared with what one
of them may have: too early an alarm rather than too late a one."""

_LASTING = frozenset({"counter", "histogram"})
"""What stays of a process that is gone, so that no total goes down."""


class Collected:
    """Families that are there already, for prometheus_client to render."""

    def __init__(self, families: Iterable[Family]):
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """All families."""
        for family in self._families:
            metric = Metric(family.name, family.what, family.kind)
            metric.samples = [_restored(sample) for sample in family.samples]
            yield metric


def collected(registry: CollectorRegistry) -> list[Family]:
    """A process's own families."""
    return [
        Family(metric.name, metric.type, metric.documentation, [_sample(sample) for sample in metric.samples])
        for metric in registry.collect()
    ]


def merged(processes: Iterable[Iterable[Family]]) -> list[Family]:
    """The families of all processes as one's: counters, histograms and most gauges summed."""
    families: dict[str, tuple[Family, dict[_Key, Sample]]] = {}
    for process in processes:
        for family in process:
            _, samples = families.setdefault(family.name, (family, {}))
            combine = _combination(family)
            for sample in family.samples:
                key = sample.name, tuple(sample.labels.items())
                known = samples.get(key)
                samples[key] = sample if known is None else _joined(known, sample, combine)
    return [
        Family(family.name, family.kind, family.what, list(samples.values())) for family, samples in families.values()
    ]


def departed(process: Iterable[Family]) -> list[Family]:
    """What stays of the metrics of a process that is gone."""
    return [
        family if family.kind in _LASTING else Family(family.name, family.kind, family.what, []) for family in process
    ]


def _combination(family: Family) -> Callable[[float, float], float]:
    if family.kind == "gauge":
        for name, combination in _OTHERWISE.items():
            if family.name.endswith(name):
                return combination
    return float.__add__


def _joined(one: Sample, other: Sample, combine: Callable[[float, float], float]) -> Sample:
    exemplars = [found for found in (one.exemplar, other.exemplar) if found is not None]
    newest = max(exemplars, key=lambda exemplar: exemplar[2] or 0.0, default=None)
    return Sample(one.name, one.labels, combine(float(one.value), float(other.value)), newest)


def _sample(sample: PrometheusSample) -> Sample:
    found = sample.exemplar
    exemplar = None if found is None else (found.labels, float(found.value), _seconds(found.timestamp))
    return Sample(sample.name, sample.labels, float(sample.value), exemplar)


def _restored(sample: Sample) -> PrometheusSample:
    found = sample.exemplar
    exemplar = None if found is None else Exemplar(*found)
    return PrometheusSample(sample.name, sample.labels, sample.value, None, exemplar)


def _seconds(time: object) -> float | None:
    return None if time is None else float(time)  # type: ignore[arg-type]
