"""`GET /metrics` of the coordinator: its state, read when it is scraped, and what was counted since the start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

from prometheus_client.core import Metric

from fedmoe import __version__
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.routes.request_counts import PushCounts, RequestCounts
from fedmoe.server.service import CoordinatorService
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.wire.contract.replicas import OwnerInfo
from fedmoe.wire.http.metrics import Series

_PREFIX = "fedmoe_coordinator_"


class CoordinatorMetrics:
    """Everything that `/metrics` shows; labels are experts that are not retired, routes, statuses, codes, owners."""

    def __init__(
        self, service: CoordinatorService, requests: RequestCounts, owners: Callable[[], Sequence[OwnerInfo]]
    ) -> None:
        self.pushes = PushCounts()
        self._service = service
        self._requests = requests
        self._owners = owners

    def collect(self) -> Iterator[Metric]:
        """All of them as they are now."""
        yield from (series.family() for series in self._series())
        for histogram in (self.pushes.staleness, self.pushes.seconds):
            yield from histogram.collect()

    def _series(self) -> Iterator[Series]:
        yield Series(_PREFIX + "build_info", "Always 1; the version that runs.", ("version",), [((__version__,), 1)])
        yield from self._of_requests()
        yield from self._of_experts()
        yield from self._of_decisions()
        yield from self._of_storage()

    def _of_requests(self) -> Iterator[Series]:
        about = "Requests by the status of their answer; 499: the connection was closed before there was one."
        labels = ("method", "route", "status")
        yield Series(_PREFIX + "requests_total", about, labels, dict(self._requests.by_answer).items())
        refused = [((code,), count) for code, count in dict(self.pushes.refused).items()]
        yield Series(_PREFIX + "updates_refused_total", "Pushes that were refused, by code.", ("code",), refused)
        stored = self._service.intake.stored_bytes
        yield Series.single(_PREFIX + "update_bytes_total", "Bytes of updates that landed or are held.", stored)

    def _of_experts(self) -> Iterator[Series]:
        service, experts = self._service, self._service.coordinator.experts
        titles = {name: expert.title for name, expert in experts.items() if not expert.retired}
        by_result = dict(self.pushes.by_result).items()
        labels = titles | {"": ""}  # pushes to an expert that is not there
        results = [((labels[name], result), count) for (name, result), count in by_result if name in labels]
        about = "Pushes by what became of them; the expert is empty where the push named none there is."
        yield Series(_PREFIX + "updates_total", about, ("expert", "result"), results)
        states = [(("active",), len(titles)), (("retired",), len(experts) - len(titles))]
        yield Series(_PREFIX + "experts", "Experts there are.", ("state",), states)
        versions = {name: experts[name].version for name in titles}
        yield _by_expert("expert_version", "The newest version.", versions, titles)
        workers = dict.fromkeys(titles, 0) | service.leases.active()
        about = "Workers that pushed since the start and are not silent for longer than is usual for them."
        yield _by_expert("active_workers", about, workers, titles)
        about = "When the newest update landed, in seconds since 1970."
        yield _by_expert("last_update_timestamp_seconds", about, service.roster.newest(), titles)

    def _of_decisions(self) -> Iterator[Series]:
        service, coordinator = self._service, self._service.coordinator
        for name, about, value in (
            ("uploads", "Updates under way: arriving, being checked or decided.", service.intake.uploads),
            ("decisions_waiting", "Decisions that wait for the committer.", service.committer.waiting),
            ("held_updates", "Updates that wait for an administrator.", len(coordinator.quarantine.held)),
            ("gateway_version", "Rises with every change of what the gateway is made of.", coordinator.gateway_version),
            ("gateway_build_seconds", "How long the newest gateway took to build.", service.gateway_build_seconds),
        ):
            yield Series.single(_PREFIX + name, about, value)

    def _of_storage(self) -> Iterator[Series]:
        service = self._service
        about = "1 once storage failed; nothing is accepted then."
        yield Series.single(_PREFIX + "storage_failed", about, service.committer.failed is not None)
        # What cannot be read any more is left out: that storage failed must still be seen.
        with suppress(StorageFailedError, RefusedError):
            terms = [((owner.duty, owner.replica), owner.term) for owner in self._owners()]
            about = "Which replica owns a duty, and the term, which rises with every change of owner."
            yield Series(_PREFIX + "owner_term", about, ("duty", "replica"), terms)
            yield Series.single(_PREFIX + "journal_events", "Events in the journal.", service.journal.count())
        if service.retention is not None:
            with suppress(OSError):
                disk = service.retention.usage()
                yield Series.single(_PREFIX + "stored_bytes", "Bytes of updates that are stored.", disk.stored)
                if disk.free is not None:
                    yield Series.single(_PREFIX + "disk_free_bytes", "Bytes free where updates are stored.", disk.free)


def _by_expert(name: str, about: str, values: Mapping[str, float], titles: Mapping[str, str]) -> Series:
    """A gauge for every expert that has a title; `values` and `titles` by first names."""
    shown = [((titles[first],), value) for first, value in values.items() if first in titles]
    return Series(_PREFIX + name, about, ("expert",), shown)
