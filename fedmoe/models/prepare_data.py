"""Prepares training data: rows to tokenised samples and one report, cached for the next start on request."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache as once
from importlib.metadata import version
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedmoe import datasets
from fedmoe.datasets.readers.common import BadRow, DataError
from fedmoe.datasets.readers.compressed import bare_name
from fedmoe.datasets.report import DataReport, TokenCounts
from fedmoe.datasets.row_scan import RowHashes, RowOptions, RowScan
from fedmoe.datasets.tokens.tokenization import LONG_ROW_POLICIES, LongRowPolicy, TokenData, tokenize_samples
from fedmoe.datasets.tokens.tokenized_sample import MASKED, TokenizedSample, Tokenizer, previews
from fedmoe.runtime.files import write_atomic

_log = logging.getLogger(__name__)
_REPORT: TypeAdapter[DataReport] = TypeAdapter(DataReport)
#: Other data than the newest are tokenised again: the folder holds copies of private data and stays small.
_FILES_KEPT = 8


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

    `from_cache`: they were tokenised at an earlier start.
    """

    samples: tuple[TokenizedSample, ...]
    row_hashes: RowHashes
    report: DataReport
    from_cache: bool = False


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
    fingerprint = scan.source.fingerprint()
    made_of = [fingerprint, kinds, max_length, asdict(options)]
    file = _cache_file(cache, tokenizer, made_of) if cache else None
    if file and (cached := _read_cache(file)):
        # What of a folder is not read is no part of what the tokens follow from.
        return replace(cached, report=replace(cached.report, source=str(name), notes=scan.source.left_out))
    data = tokenize_samples(scan.samples(), tokenizer, max_length, options.long_rows, processes, progress)
    report = _report(scan, data, tokenizer, max_length, options)
    if refuse:
        report.raise_problem()
    hashes = np.array([scan.hashes[number] for number in data.row_of], np.uint64)
    prepared = PreparedData(tuple(data.samples), hashes, report)
    # Files that changed after the first look at them would be kept under the name of what they were.
    if file and not report.problem and report.sha256 == fingerprint:
        _write_cache(file, prepared)
    return prepared


def _report(scan: RowScan, data: TokenData, tokenizer: Tokenizer, max_length: int, options: DataOptions) -> DataReport:
    places = ((scan.places[number], reason) for number, reason in data.refused)
    refused = [BadRow(line, reason, file) for (file, line), reason in places]
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
    return scan.report(refused, tokens)


def _cache_file(folder: Path, tokenizer: Tokenizer, made_of: Sequence[object]) -> Path | None:
    """The file for data and options (`made_of`, JSON values), tokenizer and code; None where tokens cannot be kept."""
    template = str(tokenizer.chat_template or "")
    # Others cannot say what the tokens follow from, or they look at the clock.
    if not tokenizer.is_fast or "strftime_now" in template:
        return None
    # A fast tokenizer of transformers; `Tokenizer` is only what tokenising needs of it.
    vocabulary = hashlib.sha256(str(attrgetter("backend_tokenizer")(tokenizer).to_str()).encode()).hexdigest()
    identity = [vocabulary, template, tokenizer.eos_token_id, tokenizer.bos_token_id, version("transformers")]
    key = hashlib.sha256(json.dumps([_code_hash(), identity, *made_of], sort_keys=True).encode()).hexdigest()
    return folder / f"{key[:40]}.safetensors"


def _read_cache(path: Path) -> PreparedData | None:
    """What is kept, or None if nothing is or it is damaged; a damaged file is made anew."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            arrays: dict[str, NDArray[np.generic]] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        if metadata.get("digest") != _digest(arrays, metadata["report"]):
            raise ValueError("its content is not what was written")
        report = _REPORT.validate_json(metadata["report"])
        all_ids, all_learned = arrays["ids"].astype(np.int64), arrays["learned"].astype(np.bool_)
        samples = []
        for start, stop in pairwise([0, *np.cumsum(arrays["sizes"].astype(np.int64)).tolist()]):
            ids = all_ids[start:stop]
            samples.append(TokenizedSample(ids, np.where(all_learned[start:stop], ids, MASKED)))
        row_hashes = arrays["row_hashes"].astype(np.uint64)
        path.touch()
    except (OSError, SafetensorError, ValidationError, ValueError, KeyError) as error:
        _log.warning("kept tokens cannot be used and are made anew: %s: %s", path, error)
        return None
    return PreparedData(tuple(samples), row_hashes, report, from_cache=True)


def _write_cache(file: Path, data: PreparedData) -> None:
    """Keep these tokens; a folder that takes none costs only time at the next start."""
    arrays: dict[str, NDArray[np.generic]] = {
        "ids": np.concatenate([np.empty(0, np.int32), *(sample.input_ids.astype(np.int32) for sample in data.samples)]),
        "learned": np.concatenate([np.empty(0, np.uint8), *(sample.labels != MASKED for sample in data.samples)]),
        "sizes": np.array([len(sample.input_ids) for sample in data.samples], np.int64),
        "row_hashes": data.row_hashes,
    }
    report = _REPORT.dump_json(data.report).decode()
    metadata = {"report": report, "digest": _digest(arrays, report)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(file, save(arrays, metadata))
        for old in sorted(file.parent.glob("*.safetensors"), key=_changed, reverse=True)[_FILES_KEPT:]:
            old.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("tokens are not kept for the next start: %s", error)


def _changed(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # another process has just removed it
        return 0.0


def _digest(arrays: dict[str, NDArray[np.generic]], report: str) -> str:
    digest = hashlib.sha256(report.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


@once
def _code_hash() -> str:
    """Of the source that turns rows into tokens: another version may render other ones."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for file in sorted(Path(datasets.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
