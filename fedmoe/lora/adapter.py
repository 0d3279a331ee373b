"""LoRA adapters: the flat weights, with a layout, that FedMoE trains, ships, merges and serves.

An adapter is one flat float32 vector with a layout that says which part is which factor. Keeping it flat makes the
hot paths (apply an update, check it, hash it, hand it to an optimizer) one pass over contiguous memory instead of
hundreds of small arrays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
FloatVector = FloatArray
FloatMatrix = FloatArray
Float64Array = NDArray[np.float64]
Factors = tuple[FloatMatrix, FloatMatrix]


class ShapeError(ValueError):
    """Factors, vectors or layouts that do not fit together."""


def read_only(values: FloatArray) -> FloatArray:
    """A view that cannot be written to."""
    view = values.view()
    view.flags.writeable = False
    return view


@dataclass(frozen=True, slots=True, order=True)
class ModuleShape:
    """One adapted linear module: its name in the base model and its feature counts."""

    name: str
    in_features: int
    out_features: int

    def __post_init__(self) -> None:
        if not self.name or self.in_features < 1 or self.out_features < 1:
            raise ShapeError(
                f"module {self.name!r} has in_features={self.in_features}, out_features={self.out_features}; "
                "a name and positive feature counts are needed"
            )


@dataclass(frozen=True, slots=True)
class Span:
    """Where one module's factors lie in the flat vector: A is `[start, middle)`, B is `[middle, stop)`."""

    start: int
    middle: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """Which part of a flat vector is which factor: modules in name order, for each A (r x in) then B (out x r)."""

    modules: tuple[ModuleShape, ...]
    rank: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ShapeError(f"rank must be at least 1, got {self.rank}")
        if not self.modules:
            raise ShapeError("an adapter needs at least one module; check target_modules")
        ordered = tuple(sorted(self.modules, key=lambda module: module.name))
        names = [module.name for module in ordered]
        if len(set(names)) != len(names):
            repeated = sorted(name for name, count in Counter(names).items() if count > 1)
            raise ShapeError(f"modules named more than once: {repeated[:5]}")
        object.__setattr__(self, "modules", ordered)

    @cached_property
    def spans(self) -> Mapping[str, Span]:
        """Module name -> where its factors lie."""
        spans: dict[str, Span] = {}
        start = 0
        for module in self.modules:
            middle = start + self.rank * module.in_features
            stop = middle + self.rank * module.out_features
            spans[module.name] = Span(start, middle, stop)
            start = stop
        return spans

    @cached_property
    def size(self) -> int:
        """Numbers in the flat vector."""
        return self.rank * sum(module.in_features + module.out_features for module in self.modules)

    def with_rank(self, rank: int) -> Layout:
        """The same modules at another rank."""
        return Layout(self.modules, rank)

    def factors(self, flat: NDArray[np.float32]) -> Iterator[tuple[ModuleShape, FloatMatrix, FloatMatrix]]:
        """Each module with views of its A (r x in) and B (out x r) inside `flat`."""
        if flat.shape != (self.size,):
            raise ShapeError(f"expected a flat vector of {self.size} numbers, got shape {flat.shape}")
        for module in self.modules:
            span = self.spans[module.name]
            a = flat[span.start : span.middle].reshape(self.rank, module.in_features)
            b = flat[span.middle : span.stop].reshape(module.out_features, self.rank)
            yield module, a, b


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter: `dW = (alpha / rank) * B @ A` for every module of its layout.

    `flat` is float32, one-dimensional and read-only; an adapter is a value and never changes.
    """

    layout: Layout
    alpha: float
    flat: FloatVector

    def __post_init__(self) -> None:
        if self.flat.dtype != np.float32 or self.flat.shape != (self.layout.size,):
            raise ShapeError(
                f"expected {self.layout.size} float32 numbers, got {self.flat.dtype} of shape {self.flat.shape}"
            )
        if not np.isfinite(self.alpha) or self.alpha <= 0:
            raise ShapeError(f"alpha must be a positive number, got {self.alpha}")
        object.__setattr__(self, "alpha", float(self.alpha))  # 16 and 16.0 must hash alike
        object.__setattr__(self, "flat", read_only(self.flat))

    @property
    def rank(self) -> int:
        return self.layout.rank

    @property
    def scale(self) -> float:
        """The factor in front of the product, alpha / rank."""
        return self.alpha / self.rank

    def factors(self) -> Iterator[tuple[ModuleShape, FloatMatrix, FloatMatrix]]:
        """Each module with its A (r x in) and B (out x r)."""
        return self.layout.factors(self.flat)

    def module(self, name: str) -> Factors:
        """A (r x in) and B (out x r) of one module."""
        span = self.layout.spans[name]
        return (
            self.flat[span.start : span.middle].reshape(self.rank, -1),
            self.flat[span.middle : span.stop].reshape(-1, self.rank),
        )

    @classmethod
    def zeros(cls, layout: Layout, alpha: float) -> Adapter:
        """The adapter that changes nothing."""
        return cls(layout, alpha, np.zeros(layout.size, np.float32))

    @classmethod
    def from_factors(
        cls, factors: Mapping[str, tuple[NDArray[np.floating], NDArray[np.floating]]], alpha: float
    ) -> Adapter:
        """An adapter from `{module: (A, B)}`, A r x in, B out x r, one rank for all; the numbers are copied."""
        if not factors:
            raise ShapeError("an adapter needs at least one module, got no factors")
        flat_factors = [name for name, pair in factors.items() if any(factor.ndim != 2 for factor in pair)]
        if flat_factors:
            raise ShapeError(f"A and B must be matrices; they are not in modules {sorted(flat_factors)[:5]}")
        ranks = {a.shape[0] for a, _ in factors.values()} | {b.shape[1] for _, b in factors.values()}
        if len(ranks) != 1:
            raise ShapeError(f"all factors must share one rank, got ranks {sorted(ranks)}")
        modules = tuple(ModuleShape(name, a.shape[1], b.shape[0]) for name, (a, b) in factors.items())
        layout = Layout(modules, ranks.pop())
        flat = np.empty(layout.size, np.float32)
        for module, a_view, b_view in layout.factors(flat):
            a_view[...], b_view[...] = factors[module.name]
        return cls(layout, alpha, flat)


def initial_adapter(layout: Layout, alpha: float, seed: int) -> Adapter:
    """PEFT's default start drawn from a seed: A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0.

    Each module has its own stream, keyed by its place, so the same seed gives the same A for the same layout.
    """
    flat = np.zeros(layout.size, np.float32)
    streams = np.random.SeedSequence(seed).spawn(len(layout.modules))
    for (module, a, _), stream in zip(layout.factors(flat), streams, strict=True):
        bound = 1.0 / np.sqrt(module.in_features)
        a[...] = np.random.default_rng(stream).uniform(-bound, bound, a.shape)
    return Adapter(layout, alpha, flat)
