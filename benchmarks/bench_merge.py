"""K rank-16 experts merged by every strategy: seconds and peak memory, beside the dense SVD of the same products.

    python benchmarks/bench_merge.py [--model smollm2-135m|qwen2.5-7b|all] [--count 10] [--layers N] [--repeats 3]

One thread. Beside the seconds on the clock stand those of the processor, which a busy machine stretches less. With
`--layers` only the first layers of the model are merged; `processor_seconds_whole_model` is then multiplied by the
share and `seconds_are_extrapolated` says so. Peak memory is what numpy held at most during the merge beyond the
experts and moments that went in, so it has the result in it; `result_mib` is the result alone.

The dense way forms `W = B @ A` for every module and decomposes it with `np.linalg.svd` in float32. All shapes of
SmolLM2 are run once and counted as often as the model has them. Of Qwen2.5-7B only `k_proj` is run, and extrapolated to
the other shapes by m n min(m, n): `dense.extrapolated` names them. `bench_recompress.py` runs larger ones.

Experts are those of `bench_recompress.py`. Moments are of random inputs with falling variances, a sketch of 64 columns
a module; query, key and value have one input, so have gate and up. Time hardly depends on the numbers.
"""

from __future__ import annotations

import argparse
import gc
import time
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace

from lib.harness import measure, pin_threads, write_result

pin_threads(1)

import numpy as np  # noqa: E402  # threads are pinned first
from bench_recompress import MODELS, SEED, Model, dense_svd, experts, work  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from fedmoe.lora.adapter import Adapter  # noqa: E402
from fedmoe.lora.diagnostics import audit  # noqa: E402
from fedmoe.lora.merge import MergeResult, merge  # noqa: E402
from fedmoe.lora.moments import InputMoments, ModuleMoments, omega  # noqa: E402

COLUMNS = 64
MOST_RANK = 64
DENSE_WITHIN = 1536
#: Modules that are fed by the same input, by the name of the first.
SAME_INPUT = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "gate_proj": "mlp", "up_proj": "mlp"}


def second_moments(model: Model, number: int) -> InputMoments:
    """G = D + L L' with falling variances D and 64 common directions L, sketched without forming it."""
    modules = {}
    for layer in range(model.layers):
        parts: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
        for name, (_, n_in) in model.shapes.items():
            source = SAME_INPUT.get(name, name)
            if source not in parts:
                rng = np.random.default_rng([SEED, number, layer, len(parts)])
                parts[source] = rng.uniform(0.1, 2.0, n_in), rng.standard_normal((n_in, 64)) / np.arange(1, 65)
            variances, common = parts[source]
            full_name = f"layers.{layer}.{name}"
            test = omega(SEED, full_name, n_in, COLUMNS)
            sketch = variances[:, None] * test + common @ (common.T @ test)
            diagonal = variances + np.square(common).sum(axis=1)
            modules[full_name] = ModuleMoments(diagonal.astype(np.float32), sketch.astype(np.float32))
    return InputMoments(modules, 6_000, SEED)


def strategies(
    adapters: Mapping[str, Adapter], moments: Mapping[str, InputMoments]
) -> dict[str, Callable[[], MergeResult | None]]:
    """What is measured, by name."""
    return {
        "weighted_average, exact": lambda: merge(adapters),
        "sum, exact": lambda: merge(adapters, "sum"),
        "concat, exact": lambda: merge(adapters, "concat"),
        "scaled, energy 0.99": lambda: merge(adapters, "scaled", energy=0.99),
        "regmean, exact": lambda: merge(adapters, "regmean", moments=moments),
        "regmean, energy 0.99": lambda: merge(adapters, "regmean", moments=moments, energy=0.99),
        "audit": lambda: _audited(adapters),
    }


def _audited(adapters: Mapping[str, Adapter]) -> None:
    audit(adapters)


def peak_mib(call: Callable[[], MergeResult | None]) -> tuple[float, MergeResult | None]:
    """What a call held at most, in MiB, beyond what was there before; and its result."""
    gc.collect()
    tracemalloc.start()
    result = call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20, result


def dense_way(model: Model, adapters: Mapping[str, Adapter]) -> dict[str, object]:
    """Processor seconds to decompose every product: shapes up to 1536 and k_proj measured, the others by their work."""
    measured: dict[tuple[int, int], float] = {}
    for name, shape in model.shapes.items():
        if shape in measured or (max(shape) > DENSE_WITHIN and name != "k_proj"):
            continue
        factors = [adapter.module(f"layers.0.{name}") for adapter in adapters.values()]
        a, b = np.vstack([a for a, _ in factors]), np.hstack([b for _, b in factors])
        begin = time.process_time()
        dense_svd(a, b)
        measured[shape] = time.process_time() - begin
    reference = model.shapes["k_proj"]
    each = [measured.get(shape, measured[reference] * work(shape) / work(reference)) for shape in model.shapes.values()]
    return {
        "measured_processor_seconds": {f"{out}x{n_in}": seconds for (out, n_in), seconds in measured.items()},
        "processor_seconds_whole_model": sum(each) * model.layers,
        "extrapolated": [name for name, shape in model.shapes.items() if shape not in measured],
    }


def bench(model: Model, count: int, layers: int, repeats: int) -> dict[str, object]:
    part = replace(model, layers=layers)
    adapters = {f"expert_{number}": adapter for number, (_, adapter) in enumerate(experts(part.layout(), count))}
    moments = {name: second_moments(part, number) for number, name in enumerate(adapters)}
    share = model.layers / layers
    found: dict[str, object] = {
        "layers": f"{layers} of {model.layers}",
        "experts_mib": round(sum(adapter.flat.nbytes for adapter in adapters.values()) / 2**20, 1),
        "moments_mib": round(sum(_bytes(known) for known in moments.values()) / 2**20, 1),
        "seconds_are_extrapolated": share > 1,
        "dense": dense_way(model, adapters),
    }
    for name, call in strategies(adapters, moments).items():
        peak, result = peak_mib(call)
        begin = time.process_time()
        seconds = measure(call, repeats, warm_up=False)
        used = (time.process_time() - begin) / repeats
        found[name] = {
            **seconds.to_json(),
            "processor_seconds": used,
            "processor_seconds_whole_model": used * share,
            "peak_mib": round(peak, 1),
            **({} if result is None else _described(result)),
        }
        print(name, found[name], flush=True)
    return found


def _bytes(moments: InputMoments) -> int:
    return sum(module.diagonal.nbytes + module.sketch.nbytes for module in moments.modules.values())


def _described(merged: MergeResult) -> dict[str, object]:
    return {
        "rank": merged.rank,
        "result_mib": round(merged.adapter.flat.nbytes / 2**20, 1),
        "truncation_error": merged.truncation_error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument(
        "--layers", type=int, help="merge only so many layers; all of SmolLM2's, 1 of Qwen's if not given"
    )
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    found: dict[str, object] = {}
    for name in MODELS if chosen.model == "all" else [chosen.model]:
        model = MODELS[name]
        layers = chosen.layers or (model.layers if name.startswith("smollm2") else 1)
        print(f"{name}, K = {chosen.count}", flush=True)
        found[f"{name}, K = {chosen.count}"] = bench(model, chosen.count, min(layers, model.layers), chosen.repeats)
    print(write_result("merge", found, vars(chosen), [SEED]))


if __name__ == "__main__":
    main()
