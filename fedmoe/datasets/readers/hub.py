"""Data sets of a hub, through the library `datasets`, which comes with the extra `fedmoe[hub]`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.readers.data_file import is_data_name

_ID = re.compile(
    r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<config>[\w][\w.-]*))?(?:@(?P<revision>[\w./-]+))?(?::(?P<split>\w+))?"
)


@dataclass(frozen=True, slots=True)
class HubId:
    """`owner/name`, `owner/name/config`, with `@revision` and `:split` behind it."""

    name: str
    config: str | None = None
    revision: str | None = None
    split: str | None = None


def parse_hub_id(text: str) -> HubId | None:
    """The parts of a hub id; None for a data file's name, or a path below a folder that exists."""
    match = _ID.fullmatch(text)
    if match is None or is_data_name(text) or Path(text).parts[0] in (".", "..") or Path(text).parent.exists():
        return None
    return HubId(match["name"], match["config"], match["revision"], match["split"])


def fetch(hub_id: HubId) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The Arrow files that `datasets` keeps of one split, and what of the data set is left out."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"{hub_id.name}: no such file or folder here; to fetch it from a hub: pip install 'fedmoe[hub]'"
        ) from error
    try:
        loaded = load_dataset(hub_id.name, name=hub_id.config, revision=hub_id.revision)
        splits = {str(name): [str(file["filename"]) for file in data.cache_files] for name, data in loaded.items()}
    except Exception as error:  # the network's, the hub's and the builder's errors have no common class
        first = str(error).strip().partition("\n")[0][:300]
        raise DataError(
            f"{hub_id.name}: no such file or folder here, and not had from the hub: {type(error).__name__}: {first}; "
            "check the name, the network, and HF_TOKEN if it is private"
        ) from error
    split = _split(hub_id, splits)
    others = tuple(f"{name}: not trained on, beside {split}" for name in splits if name != split)
    if not splits[split]:
        raise DataError(f"{hub_id.name}: `datasets` keeps it in memory; unset HF_DATASETS_IN_MEMORY_MAX_SIZE")
    return tuple(Path(file) for file in splits[split]), others


def _split(hub_id: HubId, splits: Mapping[str, object]) -> str:
    if hub_id.split is not None:
        if hub_id.split not in splits:
            raise DataError(f"{hub_id.name}: no split {hub_id.split!r}; there is {', '.join(splits)}")
        return hub_id.split
    if "train" in splits:
        return "train"
    names = list(splits)
    base = f"{hub_id.name}/{hub_id.config}" if hub_id.config else hub_id.name
    base += f"@{hub_id.revision}" if hub_id.revision else ""
    raise DataError(f"{hub_id.name}: no split called train, but {', '.join(names)}; name one: {base}:{names[0]}")
