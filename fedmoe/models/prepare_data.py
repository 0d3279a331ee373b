"""Prepares training data: rows to tokenised samples and one report, cached for the next start on request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

import numpy as np

from fedmoe.datasets.readers.common import BadRow, DataError
from fedmoe.datasets.readers.compressed import bare_name
from fedmoe.datasets.report import DataReport, TokenCounts
from fedmoe.datasets.row_scan import RowOptions, RowScan
from fedmoe.datasets.split import RowHashes
from fedmoe.datasets.tokens.long_samples import LONG_ROW_POLICIES, LongRowPolicy
from fedmoe.datasets.tokens.tokenization import TokenData, tokenize_samples
from fedmoe.datasets.tokens.tokenized_sample import TokenizedSample, Tokenizer, previews
from fedmoe.models.token_cache import CachedTokens, TokenCache


@dataclass(frozen=True, slots=True)
class DataOptions:
    """How data become samples: how rows are read, and what becomes of a prompt with an answer that does not fit."""

    rows: RowOptions = field(default_factory=RowOptions)
    long_rows: LongRowPolicy = "truncate"

    @classmethod
    def of(cls, rows: RowOptions, long_rows: str | None) -> DataOptions:
        """With the policy for long rows as text, None for the default; raises `DataError` for an unknown one."""
        if long_rows is None:
            return cls(rows)
        for policy in LONG_ROW_POLICIES:
            if policy == long_rows:
                return cls(rows, policy)
        raise DataError(f"--long-rows must be one of {', '.join(LONG_ROW_POLICIES)}, got {long_rows!r}")


@dataclass(frozen=True, eq=False)
class PreparedData:
    """Samples to train on; `row_hashes[i]` is of the row of sample `i`, so that a row stays on one side of a split.

    `kept`: they were tokenised at an earlier start.
    """

    samples: tuple[TokenizedSample, ...]
    row_hashes: RowHashes
    report: DataReport
    kept: bool = False


def prepare_samples(
    name: str | Path,
    tokenizer: Tokenizer,
    max_length: int,
    options: DataOptions | None = None,
    *,
    cache: Path | None = None,
    processes: int = 1,
    progress: Callable[[int], None] = lambda done: None,
    refuse: bool = True,
) -> PreparedData:
    """The samples of a file, folder or hub data set.

    Raises `DataError` with the report where they are not fit to train on, unless `refuse` is false.
    """
    options = options or DataOptions()
    scan = RowScan(name, options.rows)
    # The name's end tells how the bytes are read: the same ones are other rows as .csv and as .tsv.
    kinds = sorted({bare_name(path.name).rpartition(".")[2].lower() for path in scan.source.files})
    place = TokenCache.of(cache, tokenizer, [scan.source.fingerprint(), kinds, max_length, asdict(options)])
    if place and (cached := place.read()):
        # What of a folder is not read is no part of what the tokens follow from.
        report = replace(cached.report, source=str(name), notes=scan.source.left_out)
        return PreparedData(cached.samples, cached.row_hashes, report, kept=True)
    data = tokenize_samples(scan.samples(), tokenizer, max_length, options.long_rows, processes, progress)
    report = _report(scan, data, tokenizer, max_length, options)
    if refuse:
        report.raise_problem()
    hashes = np.array([scan.hashes[number] for number in data.row_of], np.uint64)
    if place and not report.problem:
        place.write(CachedTokens(tuple(data.samples), hashes, report))
    return PreparedData(tuple(data.samples), hashes, report)


def _report(scan: RowScan, data: TokenData, tokenizer: Tokenizer, max_length: int, options: DataOptions) -> DataReport:
    places = ((scan.places[refusal.number], refusal.reason) for refusal in data.refused)
    refused = tuple(BadRow(line, reason, file) for (file, line), reason in places)
    tokens = TokenCounts(
        max_length=max_length,
        long_rows=options.long_rows,
        samples=len(data.samples),
        tokens=sum(len(sample.input_ids) for sample in data.samples),
        learned=sum(sample.learned for sample in data.samples),
        median=int(median(data.lengths)) if data.lengths else 0,
        longest=max(data.lengths, default=0),
        cut=data.counts["cut"],
        split=data.counts["split"],
        lost=data.counts["lost"],
        too_long=len(data.too_long),
        empty=len(data.empty),
        refused=len(refused),
        endless=data.counts["endless"],
        notes=dict(data.notes),
        previews=previews(data.samples, tokenizer),
    )
    return replace(scan.report(), counts=scan.counts(refused), tokens=tokens)
