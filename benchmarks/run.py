"""Runs benchmarks by name, one after another, and writes the tables of benchmarks/README.md anew.

    python benchmarks/run.py                                   # all that need no peer and no long training
    python benchmarks/run.py update_norms recovery             # these
    python benchmarks/run.py merge_quality --work FOLDER       # one, with options of its own instead of the usual ones
    python benchmarks/run.py --list                            # every benchmark: what it measures, what it needs

Each is a process of its own and writes `results/*.json` with commit, hardware, seeds, median and spread.
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.harness import ROOT

FOLDER = ROOT / "benchmarks"
_OURS = ("-h", "--help", "--list")
_EXPERTS = "--work FOLDER, in which experts are trained for hours of processor time"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The options it is usually run with, and what else it needs; without needs it is run by `make bench`."""

    options: str = ""
    needs: str = ""


BENCHMARKS: Mapping[str, Benchmark] = {
    "against": Benchmark(needs="--against REV, an earlier commit"),
    "arena_learning": Benchmark(needs="hours of training"),
    "arena_modes": Benchmark(needs="--work FOLDER and hours of training"),
    "arena_throughput": Benchmark(needs="the peers of scripts/setup_peers.sh"),
    "attacks": Benchmark("--seconds 4"),
    "auto": Benchmark(needs="--against REV, an earlier commit"),
    "coordinator": Benchmark(),
    "evaluation_gate": Benchmark(needs=_EXPERTS),
    "fairness": Benchmark("--seconds 2 --windows 5"),
    "journals": Benchmark(needs="--database-url URL, a PostgreSQL database that schemas may be made in"),
    "lora_init": Benchmark(needs=_EXPERTS),
    "many_experts": Benchmark("--repeats 60"),
    "page": Benchmark(needs="Playwright and --browser PATH, a Chromium"),
    "memory_estimate": Benchmark(),
    "runs_page": Benchmark(needs="Playwright and --browser PATH, a Chromium"),
    "merge": Benchmark("--model all --layers 2 --repeats 1"),
    "merge_peers": Benchmark(needs="PEFT and the folder of merge_quality: --work FOLDER"),
    "merge_quality": Benchmark(needs=_EXPERTS),
    "online_gateway": Benchmark(needs=_EXPERTS),
    "ray_rollouts": Benchmark(needs="Ray: pip install 'fedmoe[ray]'"),
    "push_memory": Benchmark(needs="--against REV, an earlier commit"),
    "recompress": Benchmark(),
    "recovery": Benchmark(),
    "repeated_merges": Benchmark(needs=_EXPERTS),
    "rerank": Benchmark(needs=_EXPERTS),
    "routing": Benchmark(needs="the data of `fedmoe data build`: --data FOLDER"),
    "serve_swap": Benchmark("--poll 0.1"),
    "simulation": Benchmark("--parts scale"),
    "startup": Benchmark(needs="--against REV, an earlier commit"),
    "statistics_budget": Benchmark(needs=_EXPERTS),
    "threads": Benchmark("--steps 4 --repeats 1 --max-length 256"),
    "token_routing": Benchmark(needs=_EXPERTS),
    "tokenize": Benchmark(needs="--against REV, an earlier commit, and SmolLM2 in the cache (`fedmoe demo` brings it)"),
    "training_step": Benchmark(needs="peft, and SmolLM2 in the cache (`fedmoe demo` brings it)"),
    "update_norms": Benchmark("--seeds 0 1"),
}


def program(name: str) -> Path:
    return FOLDER / f"bench_{name}.py"


def title(name: str) -> str:
    """The first line of the program's docstring."""
    return (ast.get_docstring(ast.parse(program(name).read_text("utf-8"))) or "").partition("\n")[0]


def listing() -> str:
    """A line a benchmark, and one for what it needs."""
    lines = []
    for name, benchmark in BENCHMARKS.items():
        lines.append(f"{name:18} {title(name)}")
        lines.append(f"{'':18} needs {benchmark.needs}" if benchmark.needs else f"{'':18} run by `make bench`")
    return "\n".join(lines)


def run(name: str, options: Sequence[str]) -> int:
    """The exit status of one benchmark."""
    command = [sys.executable, str(program(name).relative_to(ROOT)), *options]
    print(" ".join(["python", *command[1:]]), flush=True)
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run; without, all that need nothing")
    parser.add_argument("--list", action="store_true", help="say what there is")
    words = sys.argv[1:]
    # The first option that is not ours, and all that follows, goes to the benchmark.
    cut = next((place for place, word in enumerate(words) if word.startswith("-") and word not in _OURS), len(words))
    chosen, options = parser.parse_args(words[:cut]), words[cut:]
    if chosen.list:
        print(listing())
        return
    if unknown := [name for name in chosen.names if name not in BENCHMARKS]:
        parser.error(f"no benchmark is called {', '.join(unknown)}; `--list` names all")
    names = chosen.names or [name for name, benchmark in BENCHMARKS.items() if not benchmark.needs]
    if options and len(names) != 1:
        parser.error(f"{' '.join(options)}: options go to one benchmark; name it")
    failed = [name for name in names if run(name, options or BENCHMARKS[name].options.split()) != 0]
    tables = subprocess.run([sys.executable, str(FOLDER / "tables.py")], cwd=ROOT, check=False).returncode
    if failed:
        print(f"failed: {', '.join(failed)}")
    sys.exit(1 if failed or tables else 0)


if __name__ == "__main__":
    main()
