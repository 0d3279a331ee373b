"""What routing costs: sixteen prompts at once to `auto` beside the same to `gateway`, in this build and an earlier one.

    python benchmarks/bench_auto.py --against REV [--pairs 5] [--experts 3 10] [--profiles 1000]

Both builds serve SmolLM2 in a process of their own, without a network, one torch thread: prompts of `--length` tokens,
`--tokens` tokens generated for each. Each pair asks `gateway` and `auto` in both builds, in alternating order, after
one pair that warms up. `ratio` is of processor seconds, `auto` over `gateway` of the same pair; `same_choices` says
that both builds gave every prompt to the same model. `profiles` is the time of one choice by the statistics of so
many experts once the features are there, one prompt at a time and sixteen together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lib.harness import ROOT, pin_threads, write_result

pin_threads(1)

import numpy as np  # noqa: E402  # threads are pinned first
from bench_against import check_source, environment, spread, unpack  # noqa: E402

from fedmoe.gateway.routers import SequenceRouter, candidates  # noqa: E402

WORK = Path(__file__).parent / "lib" / "auto_work.py"
#: Numbers in the features of a prompt: four depths of SmolLM2's 576.
WIDTH = 2304
Ask = Callable[[str], object]


@contextmanager
def served(source: Path, options: Mapping[str, object]) -> Iterator[Ask]:
    """A process that serves with the package in `source`."""
    command = [sys.executable, "-P", str(WORK), json.dumps(options)]
    with subprocess.Popen(
        command, env=environment(source), cwd=source, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        commands, answers = process.stdin, process.stdout

        def ask(line: str) -> object:
            print(line, file=commands, flush=True)
            answer = answers.readline()
            if not answer:
                raise SystemExit(f"the server of {source} ended with {process.wait(60)}; its output is above")
            return json.loads(answer)

        yield ask
        commands.close()


def compared(sides: Mapping[str, Ask], pairs: int) -> dict[str, object]:
    """Seconds of all prompts together, by build and model."""
    spent: dict[str, dict[str, list[dict[str, float]]]] = {name: {"gateway": [], "auto": []} for name in sides}
    for number in range(pairs + 1):
        for name in list(sides) if number % 2 else reversed(list(sides)):
            for model in ("gateway", "auto"):
                taken = sides[name](model)
                assert isinstance(taken, dict)
                if number:
                    spent[name][model].append(taken)
    measured: dict[str, object] = {"pairs": pairs}
    for name, models in spent.items():
        measured[name] = {
            **{
                f"{model}_{unit}_seconds": spread([each[unit] for each in taken])
                for model, taken in models.items()
                for unit in ("cpu", "wall")
            },
            **{
                f"{unit}_ratio": spread(
                    [auto[unit] / own[unit] for auto, own in zip(models["auto"], models["gateway"], strict=True)]
                )
                for unit in ("cpu", "wall")
            },
        }
    choices = [ask("choices") for ask in sides.values()]
    return {**measured, "same_choices": all(each == choices[0] for each in choices), "choices": choices[-1]}


def by_profiles(count: int, repeats: int = 50) -> dict[str, float]:
    """Median processor milliseconds of a choice among `count` experts, for each prompt."""
    random = np.random.default_rng(0)
    names = tuple(f"expert-{number:04}" for number in range(count))
    router = SequenceRouter(names, 0.01 * random.standard_normal((WIDTH, count)), random.standard_normal(count))

    def milliseconds(prompts: int) -> float:
        features = random.standard_normal((prompts, WIDTH)).astype(np.float32)
        times = []
        for _ in range(repeats):
            began = time.process_time()
            for row in router.probabilities(features):
                candidates((1, 2), router.names, row)
            times.append(1e3 * (time.process_time() - began) / prompts)
        return statistics.median(times)

    return {"experts": count, "alone_milliseconds": milliseconds(1), "sixteen_together_milliseconds": milliseconds(16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, metavar="REV", help="the earlier revision, as git names it")
    parser.add_argument("--pairs", type=int, default=5, help="measured pairs, after one to warm up")
    parser.add_argument("--experts", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--profiles", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--length", type=int, default=30, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=12, help="generated for each prompt")
    parser.add_argument("--base", default="smollm2", help="base model (smollm2, tiny)")
    options = parser.parse_args()
    measured: dict[str, object] = {"profiles": by_profiles(options.profiles)}
    with tempfile.TemporaryDirectory(prefix="fedmoe-before-") as folder:
        sources = {"before": Path(folder), "now": ROOT}
        measured["before"] = unpack(options.against, sources["before"])
        for source in sources.values():
            check_source(source)
        wanted: Sequence[int] = options.experts
        for experts in wanted:
            setting = {name: vars(options)[name] for name in ("base", "prompts", "length", "tokens")}
            setting |= {"experts": experts, "spread": 0.003}
            with ExitStack() as stack:
                sides = {name: stack.enter_context(served(source, setting)) for name, source in sources.items()}
                measured[f"{experts} experts"] = compared(sides, options.pairs)
            print(experts, json.dumps(measured[f"{experts} experts"]), flush=True)
            # After each case, so that a run that is stopped leaves what it measured.
            print(write_result("auto", measured, vars(options), [0]), flush=True)


if __name__ == "__main__":
    main()
