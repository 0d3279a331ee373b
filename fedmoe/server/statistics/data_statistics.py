"""Statistics of workers' data: checked against the manifest, kept as blobs, merged per expert.

Only the newest of each worker counts. Blobs that were replaced go with the next start's sweep, as all that the journal
no longer needs; one that is missing or damaged is left out and logged, since its worker can send it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace

import structlog

from fedmoe.coordinator import ExpertMoments, Transaction
from fedmoe.lora.adapter import Layout
from fedmoe.lora.moments import InputMoments, merge_moments
from fedmoe.lora.prompt_statistics import PromptStatistics, add_statistics
from fedmoe.lora.safetensors_bytes import CodecError
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.storage.blobs import BlobReferences, BlobStore, CorruptBlobError, MissingBlobError
from fedmoe.server.storage.journal import Journal
from fedmoe.server.storage.records import DataStatistic
from fedmoe.wire.contract.messages import DataStatisticsHeader, DataStatisticsResult, StatisticsKind

_log = structlog.get_logger("fedmoe.coordinator")

_MAX_PROMPT_BYTES = 32 << 20
# Sketches of so many columns fit, however small the experts' rank.
_COLUMNS = 64
_HEADER_BYTES = 1 << 20
# Workers of an expert whose statistics of a kind are merged, and the bytes of all of these.
_MOST_WORKERS = 256
_MOST_BYTES = 1 << 30
#: The largest mean square of an input. Real ones stay below 1e9; sums of these never overflow float32.
MAX_MOMENT = 1e15


def body_limit(kind: StatisticsKind, layout: Layout) -> int:
    """The largest body of a kind: 32 MiB for prompts, for moments twice an expert or a sketch of 64 columns."""
    if kind == "prompts":
        return _MAX_PROMPT_BYTES
    numbers = sum((min(_COLUMNS, module.in_features) + 1) * module.in_features for module in layout.modules)
    return 4 * max(2 * layout.size, numbers) + _HEADER_BYTES


def _check_moments(moments: InputMoments, layout: Layout) -> None:
    """Refuse moments that are not of exactly these modules, or of impossible size."""
    expected = {module.name: module.in_features for module in layout.modules}
    sizes = {name: module.features for name, module in moments.modules.items()}
    if sizes != expected:
        odd = min(name for name in expected.keys() | sizes.keys() if expected.get(name) != sizes.get(name))
        raise _mismatch(
            f"module {odd[:200]!r}: expected {expected.get(odd)} input features, got {sizes.get(odd)} (None: not there)"
        )
    largest = max(float(abs(part).max()) for m in moments.modules.values() for part in (m.diagonal, m.sketch))
    if largest > MAX_MOMENT:
        raise _mismatch(f"the largest number is {largest:.3g}; at most {MAX_MOMENT:g} is taken")


def refuse_suspect(suspicion: str) -> None:
    """Refuse bytes whose processing killed the coordinator again and again."""
    if suspicion:
        raise _mismatch(suspicion)


def merge_bodies(kind: StatisticsKind, bodies: Mapping[str, bytes]) -> bytes:
    """The statistics of several workers, by their names and in that order, as one; of one worker its own bytes.

    Raises `RefusedError` for statistics of other modules, sketch sizes, seeds or widths.
    """
    ordered = [bodies[worker] for worker in sorted(bodies)]
    if len(ordered) == 1:
        return ordered[0]
    try:
        if kind == "moments":
            return merge_moments([InputMoments.from_bytes(body) for body in ordered]).to_bytes()
        return add_statistics([PromptStatistics.from_bytes(body) for body in ordered]).to_bytes()
    except ValueError as error:
        raise _mismatch(f"they do not go with those of other workers: {error}") from error


def newest_of_each(arrived: Iterable[DataStatistic]) -> list[DataStatistic]:
    """The newest of every expert, kind and worker, in that order; none where it was erased."""
    newest = {(row.expert, row.kind, row.worker): row for row in arrived}
    return [newest[key] for key in sorted(newest) if newest[key].size]


class DataStatisticsStore:
    """The data statistics in a journal and its blobs."""

    def __init__(self, journal: Journal, blobs: BlobStore) -> None:
        self._journal = journal
        self._blobs = blobs
        self._tags: dict[StatisticsKind, dict[str, str]] = {}

    def blobs(self) -> BlobReferences:
        """The blobs that are needed, and those that others took the place of."""
        arrived = self._journal.data_statistics()
        return BlobReferences({row.digest for row in newest_of_each(arrived)}, {row.digest for row in arrived})

    def moments_arrived(self) -> int:
        """How many moments arrived, replaced ones included: each raised the gateway's version."""
        return sum(row.kind == "moments" for row in self._journal.data_statistics())

    def tag(self, expert: str, kind: StatisticsKind) -> str:
        """An ETag of what `merged` returns; raises `RefusedError` where there is nothing."""
        tags = self.tags(kind)
        if expert not in tags:
            raise _nothing(expert, kind)
        return tags[expert]

    def tags(self, kind: StatisticsKind) -> dict[str, str]:
        """The `tag` of every expert that has statistics of a kind."""
        cached = self._tags.get(kind)
        if cached is not None:
            return cached
        parts: dict[str, dict[str, str]] = {}
        for row in newest_of_each(self._journal.data_statistics()):
            if row.kind == kind:
                parts.setdefault(row.expert, {})[row.worker] = row.digest
        tags = {expert: hashlib.sha256(json.dumps(mine).encode()).hexdigest() for expert, mine in parts.items()}
        self._tags[kind] = tags
        return tags

    def merged(self, expert: str, kind: StatisticsKind) -> bytes:
        """The statistics of all workers of an expert as one; raises `RefusedError` where there is nothing."""
        bodies = self._bodies(expert, kind)
        if not bodies:
            raise _nothing(expert, kind)
        return merge_bodies(kind, bodies)

    def moments(self, expert: str) -> ExpertMoments | None:
        """The moments of an expert's inputs, if any worker sent some."""
        bodies = self._bodies(expert, "moments")
        return _digested(merge_bodies("moments", bodies)) if bodies else None

    def check(self, header: DataStatisticsHeader, body: memoryview, layout: Layout) -> None:
        """Refuse what is no statistics, is of another model, or cannot be merged with those of other workers.

        Raises `CodecError` or `RefusedError`.
        """
        self._refuse_too_many(header, len(body))
        try:
            if header.kind == "moments":
                _check_moments(InputMoments.from_bytes(body), layout)
            else:
                self._check_width(header, PromptStatistics.from_bytes(body))
        except CodecError:
            raise
        except ValueError as error:
            raise _mismatch(str(error)) from error
        merge_bodies(header.kind, self._bodies(header.expert, header.kind) | {header.worker: bytes(body)})

    def _refuse_too_many(self, header: DataStatisticsHeader, size: int) -> None:
        """All of an expert are read to merge them, so they have a bound together."""
        others = [row for row in self._of(header.expert, header.kind) if row.worker != header.worker]
        together_size = size + sum(row.size for row in others)
        if len(others) >= _MOST_WORKERS or together_size > _MOST_BYTES:
            raise RefusedError(
                "too_many_statistics",
                f"{len(others)} workers of this expert have sent statistics of their {header.kind}; with these they "
                f"would take {together_size} bytes. At most {_MOST_WORKERS} and {_MOST_BYTES} bytes are kept.",
                "Start the worker with --no-send-statistics, or send smaller ones.",
            )

    def keep(
        self, transaction: Transaction, header: DataStatisticsHeader, digest: str, size: int, at: float
    ) -> DataStatisticsResult:
        """Journal statistics whose blob is stored and change the transaction; for the committer, in a group of its own.

        The same bytes again change nothing.
        """
        transaction.expert(header.expert)
        merged = merge_bodies(
            header.kind, self._bodies(header.expert, header.kind) | {header.worker: self._blobs.read(digest)}
        )
        moments = _digested(merged) if header.kind == "moments" and transaction.aggregation.uses_moments else None
        digests = {row.worker: row.digest for row in self._of(header.expert, header.kind)}
        in_use = transaction.moments.get(header.expert)
        duplicate = digests.get(header.worker) == digest and (
            moments is None or (in_use is not None and in_use.digest == moments.digest)
        )
        if not duplicate:
            self._journal.add_data_statistic(DataStatistic(header.expert, header.worker, header.kind, digest, size, at))
            self._tags.pop(header.kind, None)
            if header.kind == "moments":
                transaction.learn_moments(header.expert, moments)
        return DataStatisticsResult(
            expert=header.expert,
            kind=header.kind,
            digest=digest,
            gateway_version=transaction.gateway_version,
            duplicate=duplicate,
        )

    def erase(self, transaction: Transaction, expert: str, worker: str, at: float) -> int:
        """Delete a worker's data statistics for good; how many bodies. For the committer, in a group of its own.

        A row without a size takes the place of what was sent, so that the gateway's version still counts all of them.
        """
        arrived = self._journal.data_statistics()
        for row in newest_of_each(arrived):
            if (row.expert, row.worker) == (expert, worker):
                self._journal.add_data_statistic(replace(row, size=0, at=at))
                if row.kind == "moments":
                    transaction.moments.pop(expert, None)
                    transaction.learn_moments(
                        expert, self.moments(expert) if transaction.aggregation.uses_moments else None
                    )
        mine = {row.digest for row in arrived if (row.expert, row.worker) == (expert, worker)}
        unneeded = mine - {row.digest for row in newest_of_each(self._journal.data_statistics())}
        self._tags.clear()
        self._blobs.delete(*unneeded)
        return len(unneeded)

    def _of(self, expert: str, kind: StatisticsKind) -> list[DataStatistic]:
        newest = newest_of_each(self._journal.data_statistics())
        return [row for row in newest if (row.expert, row.kind) == (expert, kind)]

    def _bodies(self, expert: str, kind: StatisticsKind) -> dict[str, bytes]:
        """Worker -> bytes, of all that can be read."""
        bodies = {row.worker: self._read(row) for row in self._of(expert, kind)}
        return {worker: body for worker, body in bodies.items() if body is not None}

    def _read(self, row: DataStatistic) -> bytes | None:
        try:
            body = self._blobs.read(row.digest)
            if row.kind == "prompts":
                PromptStatistics.from_bytes(body)  # those of an older fedmoe are as good as none
            return body
        except (MissingBlobError, CorruptBlobError, CodecError) as error:
            facts = {"expert": row.expert, "worker": row.worker, "kind": row.kind}
            _log.error("statistics_lost", **facts, reason=str(error))
            return None

    def _check_width(self, header: DataStatisticsHeader, prompts: PromptStatistics) -> None:
        """One base model gives features of one width; those of another would keep a gateway from routing at all."""
        for row in newest_of_each(self._journal.data_statistics()):
            own = (row.expert, row.worker) == (header.expert, header.worker)
            body = self._read(row) if row.kind == "prompts" and not own else None
            if body is not None:
                width = PromptStatistics.from_bytes(body).width
                if width != prompts.width:
                    raise _mismatch(f"the features have width {prompts.width}, those of {row.expert} {width}")
                return


def _digested(body: bytes) -> ExpertMoments:
    return ExpertMoments(InputMoments.from_bytes(body), hashlib.sha256(body).hexdigest())


def _mismatch(reason: str) -> RefusedError:
    return RefusedError(
        "statistics_mismatch",
        f"these statistics cannot be taken: {reason}.",
        "Collect them on the federation's base model and target modules, as fedmoe.worker.statistics does.",
    )


def _nothing(expert: str, kind: StatisticsKind) -> RefusedError:
    return RefusedError(
        "no_statistics",
        f"no worker of {expert!r} has sent statistics of its {kind} that can be read.",
        "Workers send them at start, unless run with --no-send-statistics.",
    )
