"""Adapters to test with, and the slow dense float64 arithmetic that the fast one is held against."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial

import builders
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedmoe.lora.adapter import Adapter, Layout, ModuleShape
from fedmoe.lora.moments import InputMoments, ModuleMoments, omega

Matrix = NDArray[np.float64]

Dense = dict[str, NDArray[np.float64]]

#: A and B around one, at alpha 16.
random_adapter = partial(builders.random_adapter, spread=1.0, alpha=16.0)
laws = settings(deadline=None, max_examples=50)
seeds = st.integers(0, 2**32 - 1)
features = st.integers(1, 12)
alphas = st.sampled_from([0.5, 1.0, 3.0, 4.0, 16.0, 100.0])


@st.composite
def module_shapes(draw: st.DrawFn) -> tuple[ModuleShape, ...]:
    names = draw(st.lists(st.sampled_from(["a.q", "a.v", "b.10.up", "b.9.down"]), min_size=1, max_size=3, unique=True))
    return tuple(ModuleShape(name, draw(features), draw(features)) for name in names)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    return Layout(draw(module_shapes()), draw(st.integers(1, 4)))


@st.composite
def adapters(draw: st.DrawFn, modules: tuple[ModuleShape, ...] | None = None) -> Adapter:
    """Random factors; now and then a zero factor, a repeated direction or directions of very different sizes."""
    shapes = draw(module_shapes()) if modules is None else modules
    layout = Layout(shapes, draw(st.integers(1, 5)))
    flat = random_flat(layout, draw(seeds))
    flaw = draw(st.sampled_from(["none", "none", "zero_b", "zero_a", "repeated", "levels", "tiny", "huge"]))
    for _, a, b in layout.factors(flat):
        spoil(a, b, flaw)
    return Adapter(layout, draw(alphas), flat)


def spoil(a: NDArray[np.float32], b: NDArray[np.float32], flaw: str) -> None:
    if flaw == "zero_b":
        b[:] = 0
    elif flaw == "zero_a":
        a[:] = 0
    elif flaw == "repeated":
        a[:], b[:] = a[:1], b[:, :1]
    elif flaw == "levels":  # the same product, held by rows and columns of very different sizes
        levels = np.float32(2.0) ** (24 * (-1) ** np.arange(len(a), dtype=np.float32))
        a *= levels[:, None]
        b /= levels
    elif flaw in ("tiny", "huge"):
        factor = np.float32(1e-14 if flaw == "tiny" else 1e14)
        a *= factor
        b *= factor


def random_flat(layout: Layout, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(layout.size).astype(np.float32)


def dense(adapter: Adapter) -> Dense:
    return {
        module.name: adapter.alpha / adapter.rank * (b.astype(np.float64) @ a.astype(np.float64))
        for module, a, b in adapter.factors()
    }


def dense_sum(terms: list[tuple[float, Adapter]]) -> Dense:
    parts = [(weight, dense(adapter)) for weight, adapter in terms]
    total: Dense = {}
    for name in parts[0][1]:
        total[name] = np.sum([weight * part[name] for weight, part in parts], axis=0)
    return total


def norm(products: Dense) -> float:
    return float(np.sqrt(sum(float((product**2).sum()) for product in products.values())))


def bulk(adapter: Adapter) -> float:
    """Size of the product before anything cancels in it; rounding is relative to this, not to what is left over."""
    bulks = [
        (np.linalg.norm(a.astype(np.float64), axis=1) * np.linalg.norm(b.astype(np.float64), axis=0)).sum()
        for _, a, b in adapter.factors()
    ]
    return adapter.alpha / adapter.rank * float(np.linalg.norm(bulks))


def distance(left: Dense, right: Dense) -> float:
    assert left.keys() == right.keys()
    return norm({name: left[name] - right[name] for name in left})


def raw_body(header: object, data: bytes = b"") -> bytes:
    """A body with any header, right or wrong: JSON of an object, or bytes taken as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], start: int, stop: int) -> Mapping[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def gram_of(features: int, seed: int) -> Matrix:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((60, features)) * rng.uniform(0.1, 3, features)
    product: Matrix = inputs.T @ inputs / 60
    return product


def moments_of(grams: Mapping[str, Matrix], columns: int | None = None) -> InputMoments:
    """Moments of modules with these Gram matrices; exact without `columns`."""
    modules = {}
    for name, gram in grams.items():
        sketch = gram @ omega(0, name, len(gram), min(columns or len(gram), len(gram)))
        modules[name] = ModuleMoments(np.diagonal(gram).astype(np.float32), sketch.astype(np.float32))
    return InputMoments(modules, 6_000, 0)


def random_moments(layout: Layout, seed: int, columns: int | None = None) -> InputMoments:
    """One input per number of features, as query and key have it."""
    return moments_of({shape.name: gram_of(shape.in_features, seed) for shape in layout.modules}, columns)
