"""`/metrics` of both servers, in the text format of Prometheus: series that are computed at the scrape, histograms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import Response

# When a counter was made says nothing that the start of the process does not.
disable_created_metrics()  # type: ignore[no-untyped-call]

#: Seconds, for histograms of requests: from a local answer to an upload over a slow line.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass(frozen=True, slots=True)
class Series:
    """A counter (`NAME_total`) or a gauge as it is now: values, each with those of the labels."""

    name: str
    about: str
    labels: tuple[str, ...]
    values: Iterable[tuple[tuple[str, ...], float]]

    @classmethod
    def single(cls, name: str, about: str, value: float | None) -> Series:
        """One value without labels; None where there is none yet."""
        return cls(name, about, (), () if value is None else (((), value),))

    def family(self) -> Metric:
        """The same as prometheus-client has it."""
        kind = CounterMetricFamily if self.name.endswith("_total") else GaugeMetricFamily
        family = kind(self.name, self.about, labels=self.labels)
        for labels, value in sorted(self.values):
            family.add_metric(labels, value)
        return family


@dataclass(frozen=True, slots=True)
class _Page:
    """What prometheus-client writes."""

    metrics: Sequence[Metric]

    def collect(self) -> Sequence[Metric]:
        return self.metrics


def histogram(name: str, about: str, buckets: Sequence[float] = SECONDS) -> Histogram:
    """A histogram that is in no registry."""
    return Histogram(name, about, buckets=buckets, registry=None)


def metrics_page(metrics: Iterable[Metric]) -> Response:
    """Metrics in the text format of Prometheus."""
    return Response(generate_latest(_Page(list(metrics))), media_type=CONTENT_TYPE_PLAIN_0_0_4)
