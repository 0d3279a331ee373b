"""Fuzz one reader with atheris, guided by coverage of our own code, for so many seconds of processor time.

    python tests/fuzz/fuzz.py container --seconds 600 --results benchmarks/results/fuzzing.json

Inputs that reach new code are kept in `.cache/fuzz/NAME`, one that fails beside them as `crash-...`. The run goes in
pieces, so that it can be ended at any time and begun again. Install atheris with scripts/fuzz.sh, which runs all.
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[1:1] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
NAMES = ("container", "codec", "npz", "journal_rows", "jsonl", "json_array", "csv", "parquet", "arrow")
_PIECE_SECONDS = 120


def fuzz(name: str, arguments: Sequence[str]) -> None:
    """Hand the process to libFuzzer."""
    import atheris

    # What a stranger's library does with bytes is not judged here, and costs time to watch.
    with atheris.instrument_imports(
        include=[
            "fedmoe.lora",
            "fedmoe.server.storage.event_rows",
            "fedmoe.datasets",
        ]
    ):
        from fuzz_targets import TARGETS

    atheris.Setup([sys.argv[0], *arguments], TARGETS[name])
    atheris.Fuzz()


def begin_corpus(name: str) -> Path:
    """The folder of inputs that are gone on from."""
    from fuzz_targets import seeds

    folder = ROOT / ".cache" / "fuzz" / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds(name)):
        (folder / f"seed-{number}").write_bytes(data)
    return folder


def piece(name: str, folder: Path, seed: int) -> tuple[int, str]:
    """Executions of one piece, and what went wrong in it."""
    limits = [f"-max_total_time={_PIECE_SECONDS}", "-timeout=20", "-rss_limit_mb=4096", "-max_len=4096"]
    command = [sys.executable, __file__, name, "--", *limits, f"-seed={seed}", "-print_final_stats=1"]
    # Not every reader has inputs of its own in the repository.
    folders = [path for path in (folder, ROOT / "tests/fuzz/corpus" / name) if path.is_dir()]
    command += [f"-artifact_prefix={folder.parent}/{name}-", *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    executed = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    return int(executed[1]) if executed else 0, "" if done.returncode == 0 else done.stderr[-3000:]


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    if "--" in sys.argv:
        fuzz(sys.argv[1], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--seconds", type=float, default=600.0, help="seconds of processor time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, help="a JSON file to add this run to")
    given = parser.parse_args()
    folder = begin_corpus(given.name)
    executions, pieces, wrong = 0, 0, ""
    while processor_seconds() < given.seconds and not wrong:
        count, wrong = piece(given.name, folder, given.seed + pieces)
        executions, pieces = executions + count, pieces + 1
    report = {
        "target": given.name,
        "seeds": list(range(given.seed, given.seed + pieces)),
        "processor_minutes": round(processor_seconds() / 60, 2),
        "executions": executions,
        "inputs_kept": len(list(folder.iterdir())),
        "uncaught": wrong,
    }
    print(report)
    if given.results:
        from lib.harness import add_run

        add_run(given.results, report)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
