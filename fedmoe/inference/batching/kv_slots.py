"""The key-value cache of a batch that rows join and leave between two tokens.

Every row has a slot with a length of its own, so a row that joins brings its prompt's keys and values and moves no
other. Invariant: behind a row's length its slot holds zeros. What is masked out still enters the sums, multiplied with
0, and 0 times what an earlier row left there may be no number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, DynamicLayer

_COLUMNS_STEP = 128


class _SlotLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values (slots, heads, columns, width); each row's token is written at its own place."""

    def __init__(self, slots: KVSlots, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self._slots = slots
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns, stop = self._slots.places
        self.keys[rows, :, columns] = key_states[:, :, 0]
        self.values[rows, :, columns] = value_states[:, :, 0]
        return self.keys[: len(rows), :, :stop], self.values[: len(rows), :, :stop]

    def resize(self, slots: int, columns: int) -> None:
        """Make room; what is there is kept."""
        for name in ("keys", "values"):
            old: torch.Tensor = getattr(self, name)
            new = old.new_zeros(slots, old.shape[1], columns, old.shape[3])
            new[: old.shape[0], :, : old.shape[2]] = old
            setattr(self, name, new)

    def put(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Fill slots from `first` on with prompts (rows, heads, longest, width), zeros behind them."""
        rows, longest = keys.shape[0], keys.shape[2]
        for ours, rows_in in ((self.keys, keys), (self.values, values)):
            ours[first : first + rows, :, :longest] = rows_in
            ours[first : first + rows, :, longest:] = 0

    def move(self, sources: torch.Tensor, targets: torch.Tensor, stop: int) -> None:
        """Copy slots over others, the first `stop` columns: behind them there are zeros in both."""
        for ours in (self.keys, self.values):
            ours[targets, :, :stop] = ours[sources, :, :stop]


class KVSlots:
    """The rows' cache: `cache` is given to the model, `advance` before every step says where it will write.

    Memory grows with the rows and their longest text, and is given back when the last row leaves.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._layers: list[_SlotLayer] = []
        self._lengths: list[int] = []
        self._room: list[int] = []
        self.cache = Cache(layers=[])
        self.places: tuple[torch.Tensor, torch.Tensor, int] = (torch.empty(0), torch.empty(0), 0)

    def __len__(self) -> int:
        return len(self._lengths)

    def join(
        self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]], lengths: Sequence[int], rooms: Sequence[int]
    ) -> None:
        """Add rows behind those that are there.

        `layers`: each layer's keys and values (rows, heads, longest, width), row i real up to `lengths[i]`; `rooms`:
        how long each row's text may get, prompt included.
        """
        first = len(self._lengths)
        self._lengths += lengths
        self._room += rooms
        if not self._layers:
            self._layers = [_SlotLayer(self, keys[:0], values[:0]) for keys, values in layers]
            self.cache = Cache(layers=list(self._layers))
        slots, room = self._layers[0].keys.shape[0], self._layers[0].keys.shape[2]
        needed, count = -(-max(self._room) // _COLUMNS_STEP) * _COLUMNS_STEP, len(self._lengths)
        if count > slots or needed > room:
            for layer in self._layers:
                layer.resize(slots if count <= slots else max(count, 2 * slots), max(room, needed))
        columns = torch.arange(layers[0][0].shape[2], device=self._device)
        behind = (columns[None, :] >= torch.tensor(list(lengths), device=self._device)[:, None])[:, None, :, None]
        for ours, (keys, values) in zip(self._layers, layers, strict=True):
            ours.put(first, keys.masked_fill(behind, 0), values.masked_fill(behind, 0))

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in that order; each of them either stays or moves to a slot before its own."""
        stop = max(self._lengths, default=0)
        moved = [(source, target) for target, source in enumerate(rows) if source != target]
        self._lengths = [self._lengths[row] for row in rows]
        self._room = [self._room[row] for row in rows]
        if not rows:
            self._layers, self.cache = [], Cache(layers=[])
            return
        if moved:
            sources, targets = (torch.tensor(side, device=self._device) for side in zip(*moved, strict=True))
            for layer in self._layers:
                layer.move(sources, targets, stop)

    def advance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Make place for one token a row: the mask bool (rows, 1, 1, columns) and the positions int64 (rows, 1)."""
        columns = torch.tensor(self._lengths, device=self._device)
        stop = max(self._lengths) + 1
        self.places = (torch.arange(len(self._lengths), device=self._device), columns, stop)
        self._lengths = [length + 1 for length in self._lengths]
        looks = torch.arange(stop, device=self._device)[None, :] <= columns[:, None]
        return looks[:, None, None, :], columns[:, None]
