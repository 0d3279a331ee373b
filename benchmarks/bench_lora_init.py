"""Should experts of different domains start from the same A? SmolLM2-135M, held-out text.

    python benchmarks/bench_lora_init.py --work FOLDER [--domains demo|unseen] [--seeds 0 1 2]

The experts of `bench_merge_quality.py` (rank 16, 40 steps of 2 x 256 tokens) are trained again from other first A:

    shared       the same A for every domain
    independent  each domain's A from a seed of its own, as a coordinator draws it from the expert's name
    slots        each domain 16 rows of its own of one matrix with orthogonal rows, as long as the others' rows

`kept` is (base - merged) / (base - own expert), where the own expert is of the same variant, on the same test blocks
as there; `own` is the gain of the experts themselves, in nats a token. Merges: `weighted_average`, and `regmean` at
its default scale with equal weights; nothing is chosen on held-out text.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lib.harness import pin_threads, write_result

pin_threads(1)

import numpy as np  # noqa: E402  # threads are pinned first
from bench_merge_quality import OWN, SETS, TOKENS, Bench, kept  # noqa: E402
from bench_repeated_merges import continued  # noqa: E402
from lib.trained_experts import STEPS, Work  # noqa: E402

from fedmoe.gateway.evaluation_report import report_json  # noqa: E402
from fedmoe.gateway.losses import BASE  # noqa: E402
from fedmoe.lora.adapter import (  # noqa: E402
    Adapter,
    Layout,
    initial_adapter,
)
from fedmoe.lora.formats import peft_files, read_peft  # noqa: E402
from fedmoe.lora.merge import merge  # noqa: E402
from fedmoe.models.base import load_base  # noqa: E402
from fedmoe.runtime.device import pin_threads as pin_torch  # noqa: E402
from fedmoe.runtime.files import write_folder_atomic  # noqa: E402

First = Callable[[Layout, float, int, int], Adapter]


def independent(layout: Layout, alpha: float, seed: int, place: int) -> Adapter:
    """A drawn for the domain at this place in the list."""
    return initial_adapter(layout, alpha, 1_000 * (place + 1) + seed)


def slots(layout: Layout, alpha: float, seed: int, place: int) -> Adapter:
    """The domain's own rows of one orthogonal matrix a module, each of the length that a drawn row has on average."""
    flat = np.zeros(layout.size, np.float32)
    for number, (module, a, _) in enumerate(layout.factors(flat)):
        random = np.random.default_rng([seed, number])
        basis, _ = np.linalg.qr(random.standard_normal((module.in_features, module.in_features)))
        a[...] = basis[:, place * len(a) : (place + 1) * len(a)].T / np.sqrt(3)
    return Adapter(layout, alpha, flat)


VARIANTS: Mapping[str, First | None] = {"shared": None, "independent": independent, "slots": slots}


def expert(work: Work, variant: str, domains: Sequence[str], domain: str) -> Adapter:
    """The domain's expert from this variant's first A, trained if it is not there yet."""
    first, shared = VARIANTS[variant], work.expert(domain)
    if first is None:
        return shared
    folder = work.folder / f"experts-{work.seed}-{variant}" / domain
    if not folder.is_dir():
        start = first(shared.layout, shared.alpha, work.seed, list(domains).index(domain))
        identity = work.base.identity
        folder.parent.mkdir(parents=True, exist_ok=True)
        found = continued(work, domain, start, 0, STEPS)
        write_folder_atomic(folder, peft_files(found, identity.name, identity.revision))
    return read_peft({path.name: path.read_bytes() for path in folder.iterdir()})


def measured(work: Work, variant: str, domains: Sequence[str], rank: int, count: int) -> dict[str, object]:
    """One variant of one seed: what its experts gain, and what merges of them keep."""
    experts = {domain: expert(work, variant, domains, domain) for domain in domains}
    moments = {domain: work.moments(domain, 64, TOKENS) for domain in domains}
    bench = Bench(work, experts, moments, {"test": count}, rank)
    merged = {name: merge(experts, name, moments=moments).adapter for name in ("weighted_average", "regmean")}
    matrix = bench.matrix(merged, "test")
    own = {
        domain: float(np.mean(matrix.block_losses[BASE][domain]) - np.mean(matrix.block_losses[OWN][domain]))
        for domain in domains
    }
    found = kept(matrix)
    for name, summary in found.summaries.items():
        print(variant, name, "worst", round(summary.worst.value, 3), "mean", round(summary.mean.value, 3), flush=True)
    return {"own": own, "test": report_json(matrix, found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of bench_merge_quality.py")
    parser.add_argument("--domains", choices=["demo", "unseen"], default="demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--test-blocks", type=int, default=12)
    asked = parser.parse_args()
    pin_torch(1)
    base = load_base("smollm2", "cpu")
    domains, rank = SETS[asked.domains]
    by_seed: dict[str, object] = {}
    for seed in asked.seeds:
        work = Work(asked.work, base, seed)
        work.build(domains)
        by_seed[str(seed)] = {
            variant: measured(work, variant, domains, rank, asked.test_blocks) for variant in VARIANTS
        }
        arguments = {name: str(value) for name, value in vars(asked).items() if name != "work"}
        print(write_result(f"lora_init_{asked.domains}", by_seed, arguments, asked.seeds), flush=True)


if __name__ == "__main__":
    main()
