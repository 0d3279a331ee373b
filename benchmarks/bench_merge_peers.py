"""Our merges beside those of PEFT, on the same adapters: share of own gain kept, seconds, peak memory.

    python benchmarks/bench_merge_peers.py --work FOLDER [--domains demo] [--seed 0]

Experts, moments and held-out blocks are those of `bench_merge_quality.py` (run it first with the same `--work`). Each
merge is made in a process of its own, float32, one thread. Seconds are of the processor and of the merge alone; memory
is the peak of the process beyond what it held when the adapters were loaded (for PEFT: into the model, as it needs
it). Arrow merges nothing: it routes every token in every layer, so it has no seconds of a merge; what a token of a
forward pass costs is told instead, beside that of the plain base model.

PEFT: weights 1/K for cat and svd (the exact average, at rank K r and cut to r by SVD), 1 for ties and dare_ties,
density 0.5. Regmean has the scale and weights that `bench_merge_quality.py` chose on other files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.harness import RESULTS, pin_threads, write_result

pin_threads(1)

import numpy as np  # noqa: E402  # threads are pinned first
import torch  # noqa: E402
from bench_merge_quality import OWN, SETS, TOKENS, times  # noqa: E402
from lib.trained_experts import Work  # noqa: E402
from peft import ArrowConfig, PeftModel, create_arrow_model  # noqa: E402

from fedmoe.datasets.tokens.packing import Block, collate  # noqa: E402
from fedmoe.gateway.evaluation_report import report_json  # noqa: E402
from fedmoe.gateway.losses import BASE, LossMatrix  # noqa: E402
from fedmoe.gateway.retained_gain import retained_gains  # noqa: E402
from fedmoe.lora.adapter import Adapter  # noqa: E402
from fedmoe.lora.formats import PEFT_CONFIG, PEFT_WEIGHTS, peft_files, read_peft  # noqa: E402
from fedmoe.lora.merge import merge  # noqa: E402
from fedmoe.lora.regmean import regmean  # noqa: E402
from fedmoe.models.base import LoadedBase, load_base  # noqa: E402
from fedmoe.models.packed import count_targets, token_losses  # noqa: E402
from fedmoe.runtime.device import pin_threads as pin_torch  # noqa: E402

PEFT = {"peft cat": "cat", "peft svd": "svd", "peft ties": "ties", "peft dare_ties": "dare_ties"}
OURS = ("weighted_average", "scaled", "regmean")
ARROW = {"peft arrow, top 1": 1, "peft arrow, top 2": 2}
DENSITY = 0.5

#: Domain -> block losses.
Row = dict[str, list[float]]


@dataclass(frozen=True)
class Asked:
    """Which experts, and where they and the moments are."""

    work: Path
    domains: str
    seed: int
    columns: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(SETS[self.domains][0])

    def of(self, base: LoadedBase) -> Work:
        return Work(self.work, base, self.seed)


def memory_mib(field: str) -> float:
    """`VmRSS` or `VmHWM` of this process."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def timed(make: Callable[[], object]) -> dict[str, float]:
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak starts anew; Linux only
    before, begin = memory_mib("VmRSS"), time.process_time()
    make()
    return {"processor_seconds": time.process_time() - begin, "peak_mib": memory_mib("VmHWM") - before}


def peft_merge(asked: Asked, name: str, out: Path) -> dict[str, float]:
    """PEFT's own merge, on a model of its own, since it needs one."""
    work = asked.of(load_base("smollm2", "cpu", "fp32"))
    first, *others = asked.names
    model = PeftModel.from_pretrained(work.base.model, work.adapter_folder(first), adapter_name=first)
    for domain in others:
        model.load_adapter(work.adapter_folder(domain), adapter_name=domain)
    kind, count = PEFT[name], len(asked.names)
    weights = [1.0 if "ties" in kind else 1.0 / count] * count
    density = DENSITY if "ties" in kind else None
    torch.manual_seed(asked.seed)
    found = timed(
        lambda: model.add_weighted_adapter(list(asked.names), weights, "merged", combination_type=kind, density=density)
    )
    model.save_pretrained(out, selected_adapters=["merged"])
    for file in (PEFT_CONFIG, PEFT_WEIGHTS):
        (out / "merged" / file).rename(out / file)
    return found


def our_merge(asked: Asked, name: str, out: Path) -> dict[str, float]:
    work = asked.of(load_base("tiny", "cpu"))  # no base model is needed for it
    experts = {domain: work.expert(domain) for domain in asked.names}
    made: list[Adapter] = []
    if name == "regmean":
        moments = {domain: work.moments(domain, asked.columns, TOKENS) for domain in asked.names}
        scale, weights = chosen(asked)
        limit = min(SETS[asked.domains][1], sum(expert.rank for expert in experts.values()))
        found = timed(lambda: made.append(regmean(experts, moments, 1.0, weights=weights, rank=limit).adapter))
        made[0] = times(made[0], scale)
    else:
        found = timed(lambda: made.append(merge(experts, name).adapter))
    for file, body in peft_files(made[0], "smollm2", None).items():
        (out / file).write_bytes(body)
    return found


def chosen(asked: Asked) -> tuple[float, Mapping[str, float]]:
    """Scale and weights that the other benchmark chose on the validation half."""
    result = json.loads((RESULTS / f"merge_quality_{asked.domains}.json").read_text("utf-8"))
    of_seed = result["results"][str(asked.seed)]
    return float(of_seed["scale"]), of_seed["weights"]


def in_own_process(asked: Asked, name: str, out: Path) -> dict[str, float]:
    """One merge in a fresh process; its adapter is in `out` afterwards."""
    options = ["--work", asked.work, "--domains", asked.domains, "--seed", asked.seed, "--columns", asked.columns]
    command = [sys.executable, __file__, *map(str, options), "--only", name, "--out", str(out)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {key: float(value) for key, value in json.loads(lines[-1]).items()}


def losses_of(model: torch.nn.Module, base: LoadedBase, blocks: Sequence[Block]) -> list[float]:
    found = []
    with torch.no_grad():
        for block in blocks:
            losses, _ = token_losses(model, collate([block]), base.device)
            found.append(float(losses.double().mean()))
    return found


def arrow_rows(
    asked: Asked, blocks: Mapping[str, Sequence[Block]]
) -> tuple[dict[str, dict[str, list[float]]], dict[str, float]]:
    """Block losses of PEFT's Arrow, and processor seconds a token, on a float32 base: its bfloat16 fails on a CPU."""
    rows, seconds = {}, {}
    for name, top in ARROW.items():
        base = load_base("smollm2", "cpu", "fp32")
        folders = [str(asked.of(base).adapter_folder(domain)) for domain in asked.names]
        model = create_arrow_model(base.model, folders, ArrowConfig(top_k=top, rng_seed=asked.seed)).eval()
        begin = time.process_time()
        rows[name] = {domain: losses_of(model, base, found) for domain, found in blocks.items()}
        seconds[name] = (time.process_time() - begin) / _tokens(blocks)
        print(name, {domain: round(float(np.mean(losses)), 4) for domain, losses in rows[name].items()}, flush=True)
    return rows, seconds


def _tokens(blocks: Mapping[str, Sequence[Block]]) -> int:
    return sum(int((block.segment_ids >= 0).sum()) for found in blocks.values() for block in found)


def bench(asked: Asked, count: int) -> dict[str, object]:
    base = load_base("smollm2", "cpu", "fp32")
    work = asked.of(base)
    work.build(asked.names)
    experts = {domain: work.expert(domain) for domain in asked.names}
    blocks = {domain: work.held_out("test", domain, count) for domain in asked.names}

    def row(adapter: Adapter) -> Row:
        return {domain: work.block_losses(adapter, "test", domain, count) for domain in asked.names}

    begin = time.process_time()
    rows = {BASE: {domain: losses_of(base.model, base, found) for domain, found in blocks.items()}}
    seconds = {BASE: (time.process_time() - begin) / _tokens(blocks)}
    rows[OWN] = {domain: work.block_losses(experts[domain], "test", domain, count) for domain in asked.names}
    costs: dict[str, dict[str, float]] = {}
    for name in (*OURS, *PEFT):
        with tempfile.TemporaryDirectory() as folder:
            costs[name] = in_own_process(asked, name, Path(folder))
            adapter = read_peft({name: (Path(folder) / name).read_bytes() for name in (PEFT_CONFIG, PEFT_WEIGHTS)})
        costs[name]["rank"] = adapter.rank
        rows[name] = row(adapter)
        print(name, costs[name], {domain: round(float(np.mean(x)), 4) for domain, x in rows[name].items()}, flush=True)
    routed, arrow_seconds = arrow_rows(asked, blocks)
    tokens = {domain: [count_targets(collate([block])) for block in found] for domain, found in blocks.items()}
    matrix = LossMatrix.of_blocks(rows | routed, tokens)
    shares = retained_gains(matrix, dict.fromkeys(matrix.domains, OWN), [*costs, *routed])
    return {
        "merges": costs,
        "forward_processor_seconds_per_token": seconds | arrow_seconds,
        "test": report_json(matrix, shares),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of bench_merge_quality.py")
    parser.add_argument("--domains", choices=SETS, default="demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--columns", type=int, default=64, help="of the sketches of input moments")
    parser.add_argument("--test-blocks", type=int, default=12)
    parser.add_argument("--only", choices=[*OURS, *PEFT], help="make one merge and print its cost; used by itself")
    parser.add_argument("--out", type=Path, help="folder for the adapter of --only")
    options = parser.parse_args()
    pin_torch(1)
    asked = Asked(options.work, options.domains, options.seed, options.columns)
    if options.only:
        make = peft_merge if options.only in PEFT else our_merge
        print(json.dumps(make(asked, options.only, options.out)), flush=True)
        return
    arguments = {name: str(value) for name, value in vars(options).items() if name not in ("work", "only", "out")}
    result = bench(asked, options.test_blocks)
    print(write_result(f"merge_peers_{asked.domains}", result, {**arguments, "dtype": "float32"}, [asked.seed]))


if __name__ == "__main__":
    main()
