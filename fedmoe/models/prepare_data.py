"""Turns a source of data into tokenised samples and one report, by way of a cache where a folder is given."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

import numpy as np

from fedmoe.datasets.check import RowOptions, RowScan
from fedmoe.datasets.readers.compressed import bare_name
from fedmoe.datasets.readers.lines import DataError
from fedmoe.datasets.readers.rows import BadRow
from fedmoe.datasets.report import DataReport, TokenCounts
from fedmoe.datasets.split import RowHashes
from fedmoe.datasets.tokens.long_samples import LONG_ROWS, LongRows
from fedmoe.datasets.tokens.tokenization import Progress, Tokenized, tokenize_samples
from fedmoe.datasets.tokens.tokenized import TokenizedSample, Tokenizer, previews
from fedmoe.models.token_cache import KeptTokens, TokenCache


@dataclass(frozen=True, slots=True)
class DataOptions:
    """How data become samples: how rows are read, and what is done with a prompt and answer that do not fit."""

    rows: RowOptions = field(default_factory=RowOptions)
    long_rows: LongRows = "truncate"

    @classmethod
    def of(cls, rows: RowOptions, long_rows: str | None) -> DataOptions:
        """With the way of long rows as text, None for the default; raises `DataError` for an unknown one."""
        if long_rows is None:
            return cls(rows)
        for name in LONG_ROWS:
            if name == long_rows:
                return cls(rows, name)
        raise DataError(f"--long-rows must be one of {', '.join(LONG_ROWS)}, got {long_rows!r}")


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
    progress: Progress = lambda done: None,
) -> PreparedData:
    """The samples of a file, folder or hub data set; raises `DataError` with the report where they are not fit."""
    prepared = prepare_and_report(
        name, tokenizer, max_length, options, cache=cache, processes=processes, progress=progress
    )
    if prepared.report.problem:
        raise DataError(prepared.report.problem)
    return prepared


def prepare_and_report(
    name: str | Path,
    tokenizer: Tokenizer,
    max_length: int,
    options: DataOptions | None = None,
    *,
    cache: Path | None = None,
    processes: int = 1,
    progress: Progress = lambda done: None,
) -> PreparedData:
    """As `prepare_samples`, but data that are not fit have a report too."""
    chosen = options or DataOptions()
    scan = RowScan(name, chosen.rows)
    # The name's end tells how the bytes are read: the same ones are other rows as .csv and as .tsv.
    kinds = sorted({bare_name(path.name).rpartition(".")[2].lower() for path in scan.source.files})
    file = TokenCache.of(cache, tokenizer, [scan.source.fingerprint(), kinds, max_length, asdict(chosen)])
    if file and (tokens := file.read()):
        # What of a folder is not read is no part of what the tokens follow from.
        report = replace(tokens.report, source=str(name), notes=scan.source.left_out)
        return PreparedData(tuple(tokens.samples()), tokens.row_hashes, report, kept=True)
    done = tokenize_samples(scan.samples(), tokenizer, max_length, chosen.long_rows, processes, progress)
    report = _report(scan, done, tokenizer, max_length, chosen)
    hashes = np.array([scan.hashes[number] for number in done.row_of], np.uint64)
    if file and not report.problem:
        file.write(KeptTokens.of(done.samples, hashes, report))
    return PreparedData(tuple(done.samples), hashes, report)


def _report(scan: RowScan, done: Tokenized, tokenizer: Tokenizer, max_length: int, options: DataOptions) -> DataReport:
    refused = tuple(BadRow(scan.places[row.number][1], row.reason, scan.places[row.number][0]) for row in done.refused)
    tokens = TokenCounts(
        max_length=max_length,
        long_rows=options.long_rows,
        samples=len(done.samples),
        tokens=sum(len(sample.input_ids) for sample in done.samples),
        learned=sum(sample.learned for sample in done.samples),
        median=int(median(done.lengths)) if done.lengths else 0,
        longest=max(done.lengths, default=0),
        cut=done.counts["cut"],
        split=done.counts["split"],
        lost=done.counts["lost"],
        too_long=len(done.too_long),
        empty=len(done.empty),
        refused=len(refused),
        endless=done.counts["endless"],
        notes=dict(done.notes),
        previews=previews(done.samples, tokenizer),
    )
    return replace(scan.report(), counts=scan.counts(refused), tokens=tokens)
