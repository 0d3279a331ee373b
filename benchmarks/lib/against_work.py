"""What `bench_against.py` has done by another process, with the package and the benchmarks of one revision.

    python -P benchmarks/lib/against_work.py SOURCE step|merge OPTIONS

Only the standard library is imported from here: everything else is that of SOURCE, whose own benchmarks know how its
modules are called. A line `run` on the standard input does the work once and answers with its processor seconds, `end`
with a digest of what came out, by which two revisions can be told to do the same.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

Work = tuple[Callable[[int], object], Callable[[], str]]


def module(source: Path, *names: str) -> ModuleType:
    """The first of these modules that the benchmarks of the revision have."""
    folder = source / "benchmarks"
    for name in names:
        if folder.joinpath(*name.split(".")).with_suffix(".py").is_file():
            return importlib.import_module(name)
    raise SystemExit(f"{folder} has none of {', '.join(names)}; name a revision that has")


def step(source: Path, options: Mapping[str, Any]) -> Work:
    """An arena step: sample, learn, publish."""
    table = module(source, "lib.arena_step", "arena_step").Table(
        options["base"], "fp32", options["policies"], options["micro_batch_tokens"]
    )

    def digest() -> str:
        """Of what the learned policies sample."""
        samples = table.engine.sample(table.requests(0))
        drawn = [([int(token) for token in one.tokens], [float(value) for value in one.logprobs]) for one in samples]
        return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()

    return table.step, digest


def merge(source: Path, options: Mapping[str, Any]) -> Work:
    """Merges of adapters of rank 16 by the way that is named, as often as is asked for."""
    experts, bench = module(source, "bench_recompress"), module(source, "bench_merge")
    model = experts.MODELS[options["model"]]
    model = type(model)(options["layers"], model.shapes, model.dense_within)
    terms = experts.experts(model.layout(), options["count"])
    adapters = {f"expert_{number}": adapter for number, (_, adapter) in enumerate(terms)}
    moments = {name: bench.second_moments(model, number) for number, name in enumerate(adapters)}
    call = bench.strategies(adapters, moments)[options["way"]]

    def repeated(number: int) -> None:
        for _ in range(options["times"]):
            call()

    return repeated, lambda: hashlib.sha256(call().adapter.flat.tobytes()).hexdigest()


def serve(work: Work, commands: TextIO, answers: TextIO) -> None:
    """Does what every line asks for; the first run, which warms up, is asked for like the others."""
    run, digest = work
    for number, command in enumerate(commands):
        began = time.process_time()
        if command.strip() == "end":
            answer: dict[str, object] = {"digest": digest()}
        else:
            run(number)
            answer = {"cpu": time.process_time() - began}
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    source, kind, options = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    sys.path.insert(0, str(source / "benchmarks"))
    # Libraries print what they like; answers have a stream of their own.
    answers, sys.stdout = sys.stdout, sys.stderr
    serve({"step": step, "merge": merge}[kind](source, options), sys.stdin, answers)


if __name__ == "__main__":
    main()
