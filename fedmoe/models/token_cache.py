"""Cache of tokenised data: one safetensors file for each combination of data, tokenizer, options and code."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from functools import cache as once
from importlib.metadata import version
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedmoe import datasets
from fedmoe.datasets.report import DataReport
from fedmoe.datasets.split import RowHashes
from fedmoe.datasets.tokens.tokenized_sample import MASKED, TokenizedSample, Tokenizer
from fedmoe.runtime.files import write_atomic

_log = logging.getLogger(__name__)
_REPORT: TypeAdapter[DataReport] = TypeAdapter(DataReport)
#: Other data than the newest are tokenised again: the folder holds copies of private data and stays small.
_FILES_KEPT = 8


class CachedTokens(NamedTuple):
    """Samples in their order, the hash of each sample's row, and the report on the data."""

    samples: tuple[TokenizedSample, ...]
    row_hashes: RowHashes
    report: DataReport


class TokenCache:
    """The place of one tokenised source in a folder that this process may write to."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._file = folder, folder / f"{key}.safetensors"

    @classmethod
    def of(cls, folder: Path | None, tokenizer: Tokenizer, made_of: Sequence[object]) -> TokenCache | None:
        """The place for what is `made_of` these JSON values and this tokenizer; None where nothing can be kept."""
        identity = _tokenizer_identity(tokenizer)
        if folder is None or identity is None:
            return None
        key = hashlib.sha256(json.dumps([_code_hash(), identity, *made_of], sort_keys=True).encode())
        return cls(folder, key.hexdigest()[:40])

    def read(self) -> CachedTokens | None:
        """What is kept, or None if nothing is or it is damaged; a damaged file is made anew."""
        if not self._file.is_file():
            return None
        try:
            with safe_open(self._file, "numpy") as file:
                arrays: dict[str, NDArray[np.generic]] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
            if metadata.get("digest") != _digest(arrays):
                raise ValueError("its content is not what was written")
            report = _REPORT.validate_json(metadata["report"])
            all_ids, all_learned = arrays["ids"].astype(np.int64), arrays["learned"].astype(np.bool_)
            ends = np.cumsum(arrays["sizes"].astype(np.int64)).tolist()
            samples = []
            for start, stop in pairwise([0, *ends]):
                ids = all_ids[start:stop]
                samples.append(TokenizedSample(ids, np.where(all_learned[start:stop], ids, MASKED)))
            row_hashes = arrays["row_hashes"].astype(np.uint64)
            self._file.touch()
        except (OSError, SafetensorError, ValidationError, ValueError, KeyError) as error:
            _log.warning("kept tokens cannot be used and are made anew: %s: %s", self._file, error)
            return None
        return CachedTokens(tuple(samples), row_hashes, report)

    def write(self, tokens: CachedTokens) -> None:
        """Keep these; a folder that takes none costs only time at the next start."""
        samples = tokens.samples
        arrays: dict[str, NDArray[np.generic]] = {
            "ids": np.concatenate([np.empty(0, np.int32), *(sample.input_ids.astype(np.int32) for sample in samples)]),
            "learned": np.concatenate([np.empty(0, np.uint8), *(sample.labels != MASKED for sample in samples)]),
            "sizes": np.array([len(sample.input_ids) for sample in samples], np.int64),
            "row_hashes": tokens.row_hashes,
        }
        metadata = {"report": _REPORT.dump_json(tokens.report).decode(), "digest": _digest(arrays)}
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomic(self._file, save(arrays, metadata))
            for old in sorted(self._folder.glob("*.safetensors"), key=_changed, reverse=True)[_FILES_KEPT:]:
                old.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("tokens are not kept for the next start: %s", error)


def _changed(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # another process has just removed it
        return 0.0


def _digest(arrays: dict[str, NDArray[np.generic]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _tokenizer_identity(tokenizer: Tokenizer) -> list[object] | None:
    """What the tokens follow from besides the rows; None for tokenizers that cannot say, or that look at the clock."""
    template = str(tokenizer.chat_template or "")
    if not tokenizer.is_fast or "strftime_now" in template:
        return None
    # A fast tokenizer of transformers; `Tokenizer` is only what tokenising needs of it.
    vocabulary = hashlib.sha256(str(attrgetter("backend_tokenizer")(tokenizer).to_str()).encode()).hexdigest()
    return [vocabulary, template, tokenizer.eos_token_id, tokenizer.bos_token_id, version("transformers")]


@once
def _code_hash() -> str:
    """Of the source that turns rows into tokens: another version may render other ones."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for file in sorted(Path(datasets.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
