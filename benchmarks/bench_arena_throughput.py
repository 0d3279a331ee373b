"""A full step of P policies: throughput and memory of ours, beside TRL one policy after another and beside SkyRL.

    scripts/setup_peers.sh                     # once: each peer in an environment of its own
    python benchmarks/bench_arena_throughput.py [--policies 1 2 4 8] [--systems fedmoe-fp32 trl ...] [--repeats 3]

The work is the same for all: SmolLM2-135M, rank 16 on all linear layers, one prompt of 40 tokens a policy, 8 samples of
32 tokens each (never shorter), rewards compared within the 8, one optimizer step a policy; one thread.

- `fedmoe-fp32`, `fedmoe-bf16`: sample, learn, publish the new versions to the engine, all policies in one batch.
- `trl`: GRPOTrainer with peft, float32, as it comes. `trl-plain`: without gradient checkpointing, which
  takes more memory. `trl-bf16`: the same in bfloat16.
  One trainer is measured and stands for P of them one after another: what is counted is P times its step. To make P
  trainers, and to hold what belongs to the others, is left out.
- `skyrl`: the JAX back end trains P adapters of one base model, float32. Only its training part is run, and compared
  with our `learn`. It fuses q, k, v and gate, up into one adapted layer each, and pads 71 tokens to 96.

Each (system, P) is a process of its own: one step to warm up, then `--repeats` measured ones. Seconds are medians, CPU
seconds those of all threads. Peak memory is the largest resident size of the process; its growth is counted in sizes of
one adapter in float32 (19.5 MB). Tokens are sampled tokens: 256 a policy and step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

from lib.arena_workload import MARK, NEW_TOKENS, SAMPLES
from lib.harness import RESULTS, ROOT, write_result

NAME = "arena_throughput"
BENCHMARKS = Path(__file__).resolve().parent
LIB, PEERS = BENCHMARKS / "lib", BENCHMARKS / "peers"
POLICIES = (1, 2, 4, 8)
ADAPTER_BYTES = 19_537_920

Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class System:
    """One program to measure; `alone` if it trains one policy only.

    `python`: the environment variable that names its interpreter (None: this one), `folder` where it is otherwise.
    """

    script: Path
    arguments: tuple[str, ...]
    python: str | None = None
    folder: str = ""
    alone: bool = False

    def interpreter(self) -> str:
        """The interpreter; raises SystemExit saying how to get one."""
        if self.python is None:
            return sys.executable
        default = ROOT / self.folder / "bin" / "python"
        chosen = Path(os.environ.get(self.python, default))
        if not chosen.is_file():
            raise SystemExit(f"{chosen} is not there: run scripts/setup_peers.sh, or set {self.python}")
        return str(chosen)


# A micro-batch of ours holds the samples of one policy, so that memory for activations does not grow with P.
_OURS = ("--micro-batch-tokens", "320")
SYSTEMS = {
    "fedmoe-fp32": System(LIB / "arena_step.py", ("--dtype", "fp32", *_OURS)),
    "fedmoe-bf16": System(LIB / "arena_step.py", ("--dtype", "bf16", *_OURS)),
    "trl": System(PEERS / "trl_grpo.py", ("--checkpointing",), "FEDMOE_TRL_PYTHON", ".venv-trl", alone=True),
    "trl-plain": System(PEERS / "trl_grpo.py", (), "FEDMOE_TRL_PYTHON", ".venv-trl", alone=True),
    "trl-bf16": System(PEERS / "trl_grpo.py", ("--dtype", "bfloat16"), "FEDMOE_TRL_PYTHON", ".venv-trl", alone=True),
    "skyrl": System(PEERS / "skyrl_jax.py", (), "FEDMOE_SKYRL_PYTHON", ".venv-skyrl"),
}
# What is compared with what: only equal precision says anything.
BESIDE = {"trl": "fedmoe-fp32", "trl-plain": "fedmoe-fp32", "skyrl": "fedmoe-fp32", "trl-bf16": "fedmoe-bf16"}


def run(name: str, policies: int, repeats: int, model: Path) -> Row:
    """One process; raises SystemExit with the end of its output when it fails."""
    system = SYSTEMS[name]
    command = [system.interpreter(), str(system.script), "--model", str(model), "--policies", str(policies)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [BENCHMARKS, *([ROOT] if system.python is None else [])]))
    load = round(os.getloadavg()[0], 2)
    done = subprocess.run(
        [*command, "--repeats", str(repeats), *system.arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode != 0 or len(lines) != 1:
        raise SystemExit(f"{name} with {policies} policies ended with {done.returncode}:\n{done.stdout[-4000:]}")
    found = json.loads(lines[0].removeprefix(MARK))
    return summary(found, policies) | {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average_before": load,
    }


def summary(found: Mapping[str, object], policies: int) -> Row:
    """Medians and spread of the steps, whole and by part, and what else the process said."""
    steps = found["steps"]
    assert isinstance(steps, list)
    whole = {kind: [sum(step[kind].values()) for step in steps] for kind in ("wall", "cpu")}
    parts = {
        kind: {name: statistics.median(step[kind][name] for step in steps) for name in steps[0][kind]} for kind in whole
    }
    tokens = policies * SAMPLES * NEW_TOKENS
    others = {key: value for key, value in found.items() if key != "steps"}
    return {
        "policies": policies,
        "repeats": len(steps),
        **{f"{kind}_seconds": spread(values) for kind, values in whole.items()},
        **{f"{kind}_seconds_by_part": values for kind, values in parts.items()},
        "tokens_per_second": tokens / statistics.median(whole["wall"]),
        "tokens_per_cpu_second": tokens / statistics.median(whole["cpu"]),
        **others,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "minimum": min(values), "maximum": max(values)}


def compared(rows: Mapping[str, Row]) -> Row:
    """What the rows mean beside each other: our throughput over the peers', and memory for each further policy."""
    found: Row = {f"{ours} over {peer}": dict(ratios(rows, ours, peer)) for peer, ours in BESIDE.items()}
    for system in SYSTEMS:
        peaks = {row["policies"]: row["peak_bytes"] for key, row in rows.items() if key.startswith(f"{system}/")}
        if len(peaks) > 1:
            found[f"{system} adapter sizes a further policy"] = growth(peaks)  # type: ignore[arg-type]
    return found


def ratios(rows: Mapping[str, Row], ours: str, peer: str) -> Iterator[tuple[str, dict[str, float]]]:
    """For every P that both were measured at: how much less time ours takes, by the wall clock and in CPU seconds."""
    for count in POLICIES:
        alone = SYSTEMS[peer].alone
        one, two = rows.get(f"{ours}/{count}"), rows.get(f"{peer}/{1 if alone else count}")
        if one and two:
            times = count if alone else 1
            yield (
                str(count),
                {kind: times * seconds(two, kind, peer) / seconds(one, kind, peer) for kind in ("wall", "cpu")},
            )


def seconds(row: Row, kind: str, peer: str) -> float:
    """Seconds of what `peer` does too: with SkyRL the training part alone."""
    if peer == "skyrl":
        parts = row[f"{kind}_seconds_by_part"]
        assert isinstance(parts, Mapping)
        return float(parts["learn"])
    whole = row[f"{kind}_seconds"]
    assert isinstance(whole, Mapping)
    return float(whole["median"])


def growth(peaks: Mapping[int, int]) -> dict[str, float]:
    """From each P to the next one measured, and from the first to the last."""
    order = sorted(peaks)
    pairs = [*pairwise(order), (order[0], order[-1])]
    return {f"{low} to {high}": (peaks[high] - peaks[low]) / (high - low) / ADAPTER_BYTES for low, high in pairs}


def earlier(name: str) -> dict[str, Row]:
    """The rows of the last result, to measure some of them again."""
    path = RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text())["results"]["rows"]) if path.is_file() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--policies", nargs="+", type=int, choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="keep the rows of the last result that are not run now")
    parser.add_argument("--name", default=NAME, help="name of the result file")
    chosen = parser.parse_args()
    for system in chosen.systems:
        SYSTEMS[system].interpreter()
    model = Path(os.environ.get("FEDMOE_BENCH_MODEL") or prepared())
    rows = earlier(chosen.name) if chosen.keep else {}
    # Systems side by side at the same P: what else happens on the machine then touches all of them alike.
    for count in chosen.policies:
        for system in [name for name in chosen.systems if count == 1 or not SYSTEMS[name].alone]:
            rows[f"{system}/{count}"] = row = run(system, count, chosen.repeats, model)
            print(system, count, json.dumps(row), flush=True)
            write_result(chosen.name, {"rows": rows, "compared": compared(rows)}, vars(chosen), [0])
    print(json.dumps(compared(rows), indent=2))


def prepared() -> str:
    """The folder of the base model; asked of another process, so that this one stays small."""
    code = "from fedmoe.models.base import prepare_base; print(prepare_base('smollm2'))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1]


if __name__ == "__main__":
    main()
