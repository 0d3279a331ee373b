"""Tokenising chat rows beside an earlier build: processor seconds, the same tokens, and what the next start takes.

    python benchmarks/bench_tokenize.py --against REV [--rows 20000] [--pairs 5] [--processes 1]

Rows are made of the text and code of Python's own library: one to three questions with their answers, some with a
system prompt or code. The tokenizer is that of SmolLM2 (FEDMOE_CACHE, `fedmoe demo` brings it), the length 1024. Both
builds take turns in alternating order, each time in a new process; its start and imports do not count. The figure for a
million rows is extrapolated from the median. `next start`: this build again, with the tokens that it kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench_against import check_source, environment, spread, unpack
from lib.harness import ROOT, write_result

WORK = Path(__file__).parent / "lib" / "tokenize_work.py"
_MILLION = 1_000_000


def rows(count: int, seed: int) -> Iterator[dict[str, object]]:
    """Conversations whose lengths and kinds are like those of public instruction data."""
    chance = random.Random(seed)  # no secret
    texts = [file.read_text("utf-8", "ignore") for file in sorted(Path(os.__file__).parent.glob("*.py"))[:150]]
    code = [line for text in texts for line in text.splitlines() if line.strip()]
    words = [word for text in texts for part in re.findall(r'"""(.*?)"""', text, re.DOTALL) for word in part.split()]

    def prose(length: int) -> str:
        start = chance.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    def block() -> str:
        start = chance.randrange(len(code) - 10)
        return "```python\n" + "\n".join(code[start : start + chance.randint(3, 10)]) + "\n```"

    for _ in range(count):
        turns = [("system", prose(chance.randint(8, 25)))] if chance.random() < 0.3 else []
        for _ in range(chance.choice([1, 1, 1, 2, 2, 3])):
            question, answer = prose(chance.randint(6, 60)), prose(chance.randint(30, 160))
            turns.append(("user", question + (f"\n{block()}" if chance.random() < 0.2 else "")))
            turns.append(("assistant", answer + (f"\n\n{block()}\n\n{prose(20)}" if chance.random() < 0.35 else "")))
        yield {"messages": [{"role": role, "content": text} for role, text in turns]}


def once(source: Path, file: Path, processes: int, cache: Path | None = None) -> dict[str, Any]:
    """What one build says of tokenising the file once."""
    command = [sys.executable, "-P", str(WORK), str(file), str(processes), str(cache or "-")]
    done = subprocess.run(command, env=environment(source), stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def pairs_of(sources: Mapping[str, Path], file: Path, processes: int, pairs: int) -> dict[str, list[dict[str, Any]]]:
    """Both builds in turns, in alternating order."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sources}
    for number in range(pairs):
        for side in list(sources) if number % 2 else list(reversed(list(sources))):
            runs[side].append(once(sources[side], file, processes))
            print(side, json.dumps(runs[side][-1]), flush=True)
    return runs


def summary(runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, object]:
    """Seconds of each side, ratios of the pairs, and the figure for a million rows."""
    results: dict[str, object] = {}
    for unit in ("cpu", "wall"):
        values = {side: [float(run[unit]) for run in taken] for side, taken in runs.items()}
        ratios = [now / before for now, before in zip(values["now"], values["before"], strict=True)]
        results[unit] = {**{side: spread(seconds) for side, seconds in values.items()}, "ratio": spread(ratios)}
        for side, seconds in values.items():
            share = _MILLION / float(runs[side][0]["rows"]) / 60
            results[f"{side}_{unit}_minutes_a_million_extrapolated"] = spread(seconds)["median"] * share
    results["peak_mib"] = {side: max(float(run["peak_mib"]) for run in taken) for side, taken in runs.items()}
    results["same_result"] = len({run["digest"] for taken in runs.values() for run in taken}) == 1
    results["tokens"] = runs["now"][0]["tokens"]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, metavar="REV", help="the earlier revision, as git names it")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedmoe-before-") as name:
        sources, folder = {"before": Path(name), "now": ROOT}, Path(name)
        commit = unpack(options.against, sources["before"])
        for source in sources.values():
            check_source(source)
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(options.rows, options.seed)), "utf-8")
        measured: dict[str, object] = {}
        for processes in options.processes:
            measured[str(processes)] = summary(pairs_of(sources, file, processes, options.pairs))
        first, following = (once(ROOT, file, 1, folder / "kept") for _ in range(2))
        assert following["from_cache"]
        assert following["digest"] == first["digest"]
        results = {"before": commit, "megabytes": file.stat().st_size / 1e6, "processes": measured}
    print(write_result("tokenize", {**results, "first_start": first, "next_start": following}, vars(options), [0]))


if __name__ == "__main__":
    main()
