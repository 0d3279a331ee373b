"""Adapters of a checkpoint as files, restored bit for bit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from fedmoe.arena.run.float_packing import pack, unpack
from fedmoe.lora.adapter import Adapter, Layout, ModuleShape
from fedmoe.lora.algebra import baked
from fedmoe.lora.formats import PEFT_CONFIG, PEFT_WEIGHTS, peft_files, read_peft
from fedmoe.runtime.errors import ExpectedError

_ADAPTER_KEY = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)@(?P<version>\d{1,18})", re.ASCII)


class CheckpointError(ExpectedError, RuntimeError):
    """A checkpoint that cannot be written, is damaged, or belongs to another run."""


class LayoutJson(TypedDict):
    """The layout of an adapter; many share one."""

    rank: int
    modules: list[list[object]]


class AdapterEntry(TypedDict):
    """Where an adapter's numbers lie: a PEFT folder or a packed vector, and what those do not say."""

    alpha: float
    layout: int
    peft: bool


@dataclass(frozen=True, eq=False)
class AdapterFiles:
    """Adapters by `NAME@VERSION` on their way to disk: `index` and `layouts` are JSON, `contents` the files."""

    adapters: Mapping[str, Adapter]
    base_model: str
    index: Mapping[str, AdapterEntry]
    layouts: list[LayoutJson]

    def contents(self) -> Iterator[tuple[str, bytes]]:
        """File names with their bytes, one at a time: adapters of a large run do not fit into memory twice."""
        newest = _newest(self.adapters)
        for key, adapter in self.adapters.items():
            if key in newest:
                for name, data in peft_files(adapter, self.base_model).items():
                    yield f"{_peft_folder(key)}/{name}", data
            if not self.index[key]["peft"]:
                yield _packed_file(key), pack(adapter.flat)


def plan_adapter_files(adapters: Mapping[str, Adapter], base_model: str) -> AdapterFiles:
    """Plan the files: the newest version of each name as a PEFT folder, the others packed.

    PEFT's format has the scale multiplied into B. Where that rounds (a scale that is no power of two), the newest
    version is packed as well, and read from there.
    """
    newest = _newest(adapters)
    layouts: list[Layout] = []
    index: dict[str, AdapterEntry] = {}
    for key, adapter in adapters.items():
        if adapter.layout not in layouts:
            layouts.append(adapter.layout)
        read_back = _unbaked(baked(adapter), adapter.alpha).flat if key in newest else None
        exact = read_back is not None and np.array_equal(adapter.flat.view(np.uint32), read_back.view(np.uint32))
        index[key] = {"alpha": adapter.alpha, "layout": layouts.index(adapter.layout), "peft": exact}
    return AdapterFiles(adapters, base_model, index, [_layout_json(layout) for layout in layouts])


def read_adapter(key: str, entry: AdapterEntry, layouts: list[LayoutJson], read: Callable[[str], bytes]) -> Adapter:
    """The adapter of an index entry, bit for bit; `read` gives the bytes of a file by name. Raises ValueError."""
    layout = _layout(layouts[entry["layout"]])
    if not entry["peft"]:
        return Adapter(layout, entry["alpha"], unpack(read(_packed_file(key))))
    folder = _peft_folder(key)
    adapter = read_peft({name: read(f"{folder}/{name}") for name in (PEFT_CONFIG, PEFT_WEIGHTS)})
    if adapter.layout != layout:
        raise ValueError(f"{folder} has other modules or another rank than the index says")
    return _unbaked(adapter, entry["alpha"])


def _newest(keys: Iterable[str]) -> set[str]:
    """The key of the newest version of each name."""
    newest: dict[str, tuple[int, str]] = {}
    for key in keys:
        match = _ADAPTER_KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(f"adapters are saved by NAME@VERSION, got the key {key!r}")
        newest[match["name"]] = max(newest.get(match["name"], (-1, "")), (int(match["version"]), key))
    return {key for _, key in newest.values()}


def _peft_folder(key: str) -> str:
    return f"adapters/{key.partition('@')[0]}"


def _packed_file(key: str) -> str:
    return f"adapters/{key}.safetensors"


def _unbaked(adapter: Adapter, alpha: float) -> Adapter:
    """An adapter of scale 1 with its B divided by the scale that `alpha` stands for."""
    flat = adapter.flat.copy()
    with np.errstate(over="ignore"):
        for _, _, b in adapter.layout.factors(flat):
            b /= np.float32(alpha / adapter.rank)
    return Adapter(adapter.layout, alpha, flat)


def _layout_json(layout: Layout) -> LayoutJson:
    return {"rank": layout.rank, "modules": [[m.name, m.in_features, m.out_features] for m in layout.modules]}


def _layout(values: LayoutJson) -> Layout:
    modules = (ModuleShape(str(name), int(str(n_in)), int(str(n_out))) for name, n_in, n_out in values["modules"])
    return Layout(tuple(modules), values["rank"])
