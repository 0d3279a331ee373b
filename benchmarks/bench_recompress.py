"""Cutting K stacked rank-16 adapters back to rank 16: ours end to end beside the dense SVD, in the same run.

    python benchmarks/bench_recompress.py [--model smollm2-135m|qwen2.5-7b|all] [--repeats 3] [--full-dense]

One thread. "Ours" is `stack` + `recompress`, from K adapters to one. "Dense" is what tools without the core trick do
for every module: form `W = B @ A`, `np.linalg.svd(W, full_matrices=False)` in float32, keep 16 directions. Each
distinct shape is decomposed once, without repeats, and counted as often as the model has it. For Qwen2.5-7B only the
shapes of the attention are decomposed and the MLP's are extrapolated from `q_proj` by m n min(m, n): in the result
`dense.extrapolated` names them and `dense.measured_seconds` is what was really run; `--full-dense` runs them all.

The adapters are random with falling singular values (direction i has size 1/i) and the same start of A in part, like
experts that began from one seed. Time hardly depends on the numbers, the error does.

What made `recompress` faster: Cholesky of B'B where it has full rank, instead of its eigenvectors (SmolLM2, K = 10:
0.98 -> 0.69 s; K = 3: 0.11 -> 0.08 s, both measured with the scratch described next). What was tried and did not help
enough to keep: filling one float64 scratch per module instead of stacking first (4-14 % less time, at the price of a
second code path; with two passes over it, nothing was left of that). Float32 Gram matrices were ruled out unmeasured:
squaring leaves half of the seven digits to small directions. At K = 3 the Gram products and the R x R work weigh
about the same; at K = 10 on SmolLM2 the 160 x 160 eigenvectors are two thirds, on Qwen2.5-7B the products are.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import dataclass

from lib.harness import Measured, measure, pin_threads, write_result

pin_threads(1)

import numpy as np  # noqa: E402  # threads are pinned first
from numpy.typing import NDArray  # noqa: E402

from fedmoe.lora.adapter import Adapter, FloatMatrix, Layout, ModuleShape  # noqa: E402
from fedmoe.lora.algebra import product_norm, recompress, stack  # noqa: E402

RANK = 16
ALPHA = 32.0
COUNTS = (3, 10)
SEED = 0

Shape = tuple[int, int]  # out x in


@dataclass(frozen=True)
class Model:
    """The linear modules of a base model: layers and, in each, name -> (out, in)."""

    layers: int
    shapes: dict[str, Shape]
    dense_within: int  # shapes with more rows than this are extrapolated unless all are asked for

    def layout(self) -> Layout:
        modules = tuple(
            ModuleShape(f"layers.{layer}.{name}", n_in, n_out)
            for layer in range(self.layers)
            for name, (n_out, n_in) in self.shapes.items()
        )
        return Layout(modules, RANK)


MODELS = {
    "smollm2-135m": Model(
        30,
        {
            "q_proj": (576, 576),
            "o_proj": (576, 576),
            "k_proj": (192, 576),
            "v_proj": (192, 576),
            "gate_proj": (1536, 576),
            "up_proj": (1536, 576),
            "down_proj": (576, 1536),
        },
        dense_within=1536,
    ),
    "qwen2.5-7b": Model(
        28,
        {
            "q_proj": (3584, 3584),
            "o_proj": (3584, 3584),
            "k_proj": (512, 3584),
            "v_proj": (512, 3584),
            "gate_proj": (18944, 3584),
            "up_proj": (18944, 3584),
            "down_proj": (3584, 18944),
        },
        dense_within=3584,
    ),
}


def experts(layout: Layout, count: int) -> list[tuple[float, Adapter]]:
    """`count` adapters at weight 1/count, half of every A shared, B falling as 1/i."""
    start = np.random.default_rng(SEED).standard_normal(layout.size, np.float32)
    fall = 1 / np.arange(1, layout.rank + 1, dtype=np.float32)
    terms = []
    for number in range(count):
        flat = np.random.default_rng(SEED + 1 + number).standard_normal(layout.size, np.float32)
        flat += start
        for module, a, b in layout.factors(flat):
            a *= np.float32(module.in_features**-0.5)
            b *= fall
        terms.append((1 / count, Adapter(layout, ALPHA, flat)))
    return terms


def dense_svd(a: FloatMatrix, b: FloatMatrix) -> tuple[float, FloatMatrix, NDArray[np.float32]]:
    """Seconds to form and decompose one product, its best rank-16 part, and all singular values."""
    begin = time.perf_counter()
    left, values, right = np.linalg.svd(b @ a, full_matrices=False)
    cut = (left[:, :RANK] * values[:RANK]) @ right[:RANK]
    return time.perf_counter() - begin, cut, values


def compare_with_dense(model: Model, stacked: Adapter, ours: Adapter, full: bool) -> dict[str, object]:
    """Dense seconds for the whole model, shape by shape, and how far ours is from it where both were run."""
    times = Counter(model.shapes.values())
    examples = {shape: f"layers.0.{name}" for name, shape in model.shapes.items()}
    measured: dict[Shape, float] = {}
    errors: dict[str, dict[str, float]] = {}
    for shape in times:
        if full or max(shape) <= model.dense_within:
            measured[shape], errors[f"{shape[0]}x{shape[1]}"] = dense_shape(examples[shape], stacked, ours)
    reference = model.shapes["q_proj"]
    seconds = {shape: measured.get(shape, measured[reference] * work(shape) / work(reference)) for shape in times}
    return {
        "seconds": sum(seconds[shape] * number for shape, number in times.items()) * model.layers,
        "measured_seconds": sum(measured.values()),
        "seconds_per_shape": {f"{out}x{n_in}": value for (out, n_in), value in seconds.items()},
        "modules_per_shape": {f"{out}x{n_in}": number * model.layers for (out, n_in), number in times.items()},
        "extrapolated": [f"{out}x{n_in}" for out, n_in in times if (out, n_in) not in measured],
        "compared": errors,
    }


def dense_shape(name: str, stacked: Adapter, ours: Adapter) -> tuple[float, dict[str, float]]:
    a, b = stacked.module(name)
    seconds, cut, values = dense_svd(a, b)
    our_a, our_b = ours.module(name)
    norm = float(np.linalg.norm(values))
    exact = b.astype(np.float64) @ a.astype(np.float64)
    size = float(np.linalg.norm(exact))
    return seconds, {
        "difference_of_the_two_cuts": float(np.linalg.norm(our_b @ our_a - cut)) / float(np.linalg.norm(cut)),
        "error_ours": float(np.linalg.norm(exact - our_b.astype(np.float64) @ our_a)) / size,
        "error_dense": float(np.linalg.norm(exact - cut)) / size,
        "tail_of_singular_values": float(np.linalg.norm(values[RANK:])) / norm,
    }


def work(shape: Shape) -> int:
    """Operations of a dense SVD up to a constant: m n min(m, n)."""
    return shape[0] * shape[1] * min(shape)


def end_to_end(terms: list[tuple[float, Adapter]]) -> Adapter:
    return recompress(stack(terms), RANK).adapter


def bench(model: Model, count: int, repeats: int, full_dense: bool) -> dict[str, object]:
    terms = experts(model.layout(), count)
    whole: Measured = measure(lambda: end_to_end(terms), repeats)
    stacking = measure(lambda: stack(terms), repeats)
    stacked = stack(terms)
    result = recompress(stacked, RANK)
    dense = compare_with_dense(model, stacked, result.adapter, full_dense)
    dense_seconds = dense["seconds"]
    assert isinstance(dense_seconds, float)
    return {
        "modules": len(stacked.layout.modules),
        "stacked_rank": stacked.rank,
        "stacked_mib": round(stacked.flat.nbytes / 2**20, 1),
        "ours": whole.to_json(),
        "ours_stack_alone": stacking.to_json(),
        "product_norm_of_one_adapter": measure(lambda: product_norm(terms[0][1]), repeats).to_json(),
        "truncation_error": result.truncation_error,
        "dense": dense,
        "dense_over_ours": round(dense_seconds / whole.median, 1),
        "dense_over_ours_is_extrapolated": bool(dense["extrapolated"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--full-dense", action="store_true", help="decompose every shape of Qwen2.5-7B, for minutes")
    chosen = parser.parse_args()
    names = list(MODELS) if chosen.model == "all" else [chosen.model]
    found: dict[str, object] = {}
    for name in names:
        for count in COUNTS:
            key = f"{name}, K = {count}"
            found[key] = bench(MODELS[name], count, chosen.repeats, chosen.full_dense)
            print(key, found[key])
    print(write_result("recompress", found, vars(chosen), [SEED + number for number in range(max(COUNTS) + 1)]))


if __name__ == "__main__":
    main()
