"""Many LoRA adapters on one base model, chosen row by row in one batch, forward and backward.

The adapter of a row is an argument of the computation (`MultiLora.rows`), not a state of the model: two threads may
compute at the same time, one sampling with frozen versions while the other trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import TypeAlias

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedmoe.lora.adapter import Adapter, Layout, ModuleShape, ShapeError
from fedmoe.models.linear_terms import RowsTerm, linear_with_terms
from fedmoe.models.lora_layers import ALL_LINEAR, TargetError, find_targets, replace_module

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
#: Module, its inputs (rows, positions, in) -> the weight of every expert for every token (rows, positions, experts).
TokenWeights = Callable[[str, torch.Tensor], torch.Tensor]


class UnknownAdapterError(KeyError):
    """An adapter that is not there."""

    def __str__(self) -> str:
        return str(self.args[0])


class AdapterSlot:
    """One adapter in the model: a flat tensor `parameter` (size,) on the model's device.

    A trainable slot is a float32 leaf whose gradient is one flat vector; a frozen one is kept in the compute dtype.
    """

    def __init__(self, adapter: Adapter, device: torch.device, dtype: torch.dtype, trainable: bool) -> None:
        self.layout = adapter.layout
        self.alpha = adapter.alpha
        self.trainable = trainable
        flat = torch.tensor(adapter.flat, dtype=torch.float32 if trainable else dtype, device=device)
        # Numbers that only the compute dtype cannot hold are as bad: infinity times a masked 0 is no number.
        if not (flat.to(dtype).abs().max() * self.scale).isfinite():
            raise ShapeError(f"the adapter has numbers that are not finite in {dtype}; it would spoil whole batches")
        self.parameter = nn.Parameter(flat, requires_grad=trainable)

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.layout.rank

    def adapter(self) -> Adapter:
        """The current factors, copied as float32."""
        flat = self.parameter.detach().to("cpu", torch.float32, copy=True).numpy()
        return Adapter(self.layout, self.alpha, flat)

    def factors(self, dtype: torch.dtype) -> Factors:
        """Module -> (A r x in, B out x r) in `dtype`: one cast and one split, so the backward pass is one of each."""
        spans = [self.layout.spans[module.name] for module in self.layout.modules]
        sizes = [size for span in spans for size in (span.middle - span.start, span.stop - span.middle)]
        pieces = self.parameter.to(dtype).split(sizes)
        return {
            module.name: (
                pieces[2 * index].view(self.layout.rank, module.in_features),
                pieces[2 * index + 1].view(module.out_features, self.layout.rank),
            )
            for index, module in enumerate(self.layout.modules)
        }


@dataclass(frozen=True)
class _RowRange:
    """Neighbouring rows [start, stop) with the same adapter."""

    start: int
    stop: int
    scale: float
    factors: Factors


@dataclass
class _Runs:
    """Multiplies each run of rows with its own adapter: no work is wasted, whatever the ranks."""

    runs: Sequence[_RowRange]
    rows: int

    def keep(self, indices: torch.Tensor) -> None:
        """Keep only some rows of a batch that has one adapter, or none."""
        self.rows = len(indices)
        self.runs = [replace(run, stop=self.rows) for run in self.runs]

    def apply(self, module: str, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        """layer(x) + scale * (x @ A^T) @ B^T, each run of rows with its own factors."""
        terms = [RowsTerm(run.start, run.stop, run.scale, *run.factors[module]) for run in self.runs]
        return linear_with_terms(x, layer.weight, layer.bias, terms)


class _Stack:
    """All adapters' factors side by side, the ones that are not a row's own masked out: two products for all rows.

    Wasteful for long inputs, but for one token a row the number of small operations is what counts.
    """

    def __init__(self, runs: Sequence[_RowRange], rows: int) -> None:
        self.rows = rows
        distinct = {id(run.factors): run for run in runs}
        ranks = {key: next(iter(run.factors.values()))[0].shape[0] for key, run in distinct.items()}
        begins = dict(zip(ranks, accumulate(ranks.values(), initial=0), strict=False))
        device = next(iter(runs[0].factors.values()))[0].device
        other = np.ones((rows, 1, sum(ranks.values())), np.bool_)
        for run in runs:
            begin = begins[id(run.factors)]
            other[run.start : run.stop, :, begin : begin + ranks[id(run.factors)]] = False
        self.other = torch.from_numpy(other).to(device)
        self.factors = {
            module: (
                torch.cat([run.factors[module][0] for run in distinct.values()]),
                torch.cat([run.factors[module][1] * run.scale for run in distinct.values()], dim=1),
            )
            for module in runs[0].factors
        }

    def keep(self, indices: torch.Tensor) -> None:
        """Keep only the rows at `indices`."""
        self.other = self.other[indices]
        self.rows = len(indices)

    def apply(self, module: str, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        """The layer's output and every row's own low-rank term; x (rows, 1, in)."""
        a, b = self.factors[module]
        out = functional.linear(x, layer.weight, layer.bias)
        inner = functional.linear(x, a).masked_fill_(self.other, 0)
        out.flatten(0, -2).addmm_(inner.flatten(0, -2), b.t())
        return out


class _Mixture:
    """Gives every token a weighted sum of adapters: all factors side by side, and between them the tokens' weights."""

    def __init__(self, slots: Sequence[AdapterSlot], dtype: torch.dtype, weights: TokenWeights, rows: int) -> None:
        factors = [slot.factors(dtype) for slot in slots]
        self.rows = rows
        self.weights = weights
        self.ranks = torch.tensor([slot.layout.rank for slot in slots], device=slots[0].parameter.device)
        self.factors = {
            module: (
                torch.cat([own[module][0] for own in factors]),
                torch.cat([own[module][1] * slot.scale for own, slot in zip(factors, slots, strict=True)], dim=1),
            )
            for module in factors[0]
        }

    def apply(self, module: str, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        """layer(x) + sum_e weights[..., e] * scale_e * (x @ A_e^T) @ B_e^T; x (rows, positions, in)."""
        a, b = self.factors[module]
        weights = self.weights(module, x)
        if weights.shape != (*x.shape[:-1], len(self.ranks)):
            raise ShapeError(
                f"{module} needs a weight for each of {len(self.ranks)} experts and token, got {weights.shape}"
            )
        inner = functional.linear(x, a) * weights.to(x.dtype).repeat_interleave(self.ranks, dim=-1)
        return functional.linear(x, layer.weight, layer.bias) + functional.linear(inner, b)


#: The rows of a batch that is being decoded; `keep` keeps those at some indices, int64 (k,), in that order.
DecodingRows: TypeAlias = _Runs | _Stack

_ACTIVE: ContextVar[_Runs | _Stack | _Mixture | None] = ContextVar("rows of the running batch", default=None)


@contextmanager
def _active(rows: _Runs | _Stack | _Mixture | None) -> Iterator[None]:
    """Inside, the running batch has these rows."""
    token = _ACTIVE.set(rows)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


class MultiLoraLinear(nn.Module):  # type: ignore[misc]
    """A frozen linear layer whose rows get the low-rank term of their own adapter; outside `rows`, the base alone."""

    def __init__(self, base_layer: nn.Linear, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (rows, ..., in) -> (rows, ..., out)."""
        active = _ACTIVE.get()
        if active is None:
            out: torch.Tensor = self.base_layer(x)
            return out
        if x.shape[0] != active.rows:
            raise ShapeError(f"the batch has {x.shape[0]} rows, adapters were named for {active.rows}")
        return active.apply(self.name, x, self.base_layer)


class MultiLora:
    """Holds the adapters of one base model by name; ranks and scales may differ, the adapted modules may not."""

    def __init__(self, model: nn.Module, target_modules: Sequence[str] | str = ALL_LINEAR) -> None:
        if any(isinstance(module, MultiLoraLinear) for module in model.modules()):
            raise TargetError("the model holds many adapters already; use its MultiLora, or detach that first")
        targets = find_targets(model, target_modules)
        model.requires_grad_(False)
        self.model = model
        self.modules = tuple(
            sorted(ModuleShape(name, layer.in_features, layer.out_features) for name, layer in targets)
        )
        self.device: torch.device = targets[0][1].weight.device
        self.dtype: torch.dtype = targets[0][1].weight.dtype
        self._slots: dict[str, AdapterSlot] = {}
        self._bases = dict(targets)
        for name, layer in targets:
            replace_module(model, name, MultiLoraLinear(layer, name))

    def layout(self, rank: int) -> Layout:
        """The layout of an adapter of this model at `rank`."""
        return Layout(self.modules, rank)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all adapters."""
        return tuple(self._slots)

    def add(self, name: str, adapter: Adapter, trainable: bool = False) -> AdapterSlot:
        """Add an adapter; raises ShapeError for other modules or a name that is taken."""
        if name in self._slots:
            raise ShapeError(f"adapter {name!r} is there already; remove it first or use another name")
        return self._put(name, adapter, trainable)

    def replace(self, name: str, adapter: Adapter) -> AdapterSlot:
        """Put other factors, of any rank, under a name that is there; the old slot's tensors are left as they are."""
        return self._put(name, adapter, self.slot(name).trainable)

    def _put(self, name: str, adapter: Adapter, trainable: bool) -> AdapterSlot:
        if adapter.layout.modules != self.modules:
            raise ShapeError(f"adapter {name!r} adapts other modules than this model's {len(self.modules)}")
        slot = AdapterSlot(adapter, self.device, self.dtype, trainable)
        self._slots[name] = slot
        return slot

    def remove(self, name: str) -> None:
        """Remove an adapter; a batch that is being computed with it still ends with it."""
        self.slot(name)
        del self._slots[name]

    def slot(self, name: str) -> AdapterSlot:
        """The adapter of that name; raises UnknownAdapterError saying what is there."""
        if name not in self._slots:
            raise UnknownAdapterError(f"no adapter {name!r}; there are: {', '.join(sorted(self._slots)) or 'none'}")
        return self._slots[name]

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside, row i of every batch goes through adapter `names[i]` (None: the base model alone).

        Rows of one adapter should be neighbours: each change of adapter costs more products a layer.
        """
        runs = self._runs(names)
        with _active(_Runs(runs, len(names)) if runs else None):
            yield

    @contextmanager
    def decoding_rows(self, names: Sequence[str | None]) -> Iterator[DecodingRows]:
        """As `rows`, for decoding: fast for one token a row, without gradients."""
        with torch.no_grad():
            runs = self._runs(names)
            same = not runs or runs[0].stop - runs[0].start == len(names)
            rows: DecodingRows = _Runs(runs, len(names)) if same else _Stack(runs, len(names))
            with _active(rows):
                yield rows

    @contextmanager
    def mixed(self, names: Sequence[str], weights: TokenWeights, rows: int) -> Iterator[None]:
        """Inside, every token of a batch of `rows` rows goes through all adapters in `names`, each times its weight.

        `weights` is asked in every module, so that tokens can be routed by what that module sees. Weights of 1 for one
        adapter and 0 for the others are what `rows` does with it. Without gradients.
        """
        with torch.no_grad(), _active(_Mixture([self.slot(name) for name in names], self.dtype, weights, rows)):
            yield

    def _runs(self, names: Sequence[str | None]) -> list[_RowRange]:
        cast = {name: self.slot(name).factors(self.dtype) for name in dict.fromkeys(names) if name is not None}
        runs, start = [], 0
        for name, group in groupby(names):
            stop = start + len(list(group))
            if name is not None:
                runs.append(_RowRange(start, stop, self.slot(name).scale, cast[name]))
            start = stop
        return runs

    def detach(self) -> None:
        """Give the model its own linear layers back."""
        for name, layer in self._bases.items():
            replace_module(self.model, name, layer)
