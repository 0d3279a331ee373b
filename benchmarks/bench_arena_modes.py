"""What do modes buy? Five settings at equal sampled tokens, three seeds: four policies that each learn alone (GRPO),
competitive, cooperative, team battle, mixed.

    python benchmarks/bench_arena_modes.py --work FOLDER [--tokens N] [--settings ...] [--seeds 0 1 2]

The task and how policies learn are those of demo/arena.toml. After training, on different held-out questions: every
policy by itself, the best of them (chosen on other questions), the vote of all four, and their vote after drafts that
all of them see; and a game that nobody trained on, against a player that moves at random. Intervals resample questions
(deals of the game). What is done is kept in FOLDER and not done again; the same command started twice shares the work.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from lib.harness import ROOT, pin_threads, write_result

if TYPE_CHECKING:
    from lib.arena_modes import Measures
    from numpy.typing import NDArray

    from fedmoe.arena.config import ArenaConfig

SETTINGS = ("independent", "competitive", "cooperative", "team_battle", "mixed")
_CONTROL = "independent"
_BASE = "base"
Run = Mapping[str, object]


def do(work: Path, config: ArenaConfig, measures: Measures, setting: str, seed: int) -> None:
    """One run, unless it is done or another process is at it."""
    from lib.arena_modes import Examination, train

    from fedmoe.runtime.files import FolderInUseError, lock_folder

    folder, done = work / f"{setting}-{seed}", work / f"{setting}-{seed}.json"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = lock_folder(folder)
    except FolderInUseError:
        print(f"{setting} {seed}: another process is at it", flush=True)
        return
    try:
        if done.exists():
            return
        cost: dict[str, object] = {}
        if setting != _BASE:
            shutil.rmtree(folder / "run", ignore_errors=True)
            cost = train(config, setting, seed, measures.tokens, folder / "run")
        found = Examination(config, measures, seed).of(None if setting == _BASE else folder / "run")
        text = json.dumps({"setting": setting, "seed": seed, **cost, **found})
        beside = done.with_suffix(".part")
        beside.write_text(text)
        beside.replace(done)
        print(f"{setting} {seed}: done {cost}", flush=True)
    finally:
        lock.close()


def finished(work: Path, seeds: Sequence[int]) -> dict[tuple[str, int], Run]:
    """All runs of these seeds that are done."""
    names = [(setting, seed) for setting in (_BASE, *SETTINGS) for seed in seeds]
    paths = {name: work / f"{name[0]}-{name[1]}.json" for name in names}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def over_questions(values: NDArray, least: float = 0.0) -> list[float]:  # type: ignore[type-arg]
    """Mean and 95 % interval over one number a question, from `least` to 1, rounded."""
    from fedmoe.arena.rollout.interval import MeanInterval

    found = MeanInterval.of(values, range(len(values)), (least, 1.0))
    return [round(value, 3) for value in (found.mean, found.low, found.high)]


def measured(run: Run) -> dict[str, NDArray]:  # type: ignore[type-arg]
    """What is compared, one number a question or deal. The best policy is chosen on the validation questions."""
    import numpy as np

    test, validation = np.array(run["test"]), np.array(run["validation"])
    best = int(validation.mean(axis=1).argmax())
    found = {"single": test.mean(axis=0), "best": test[best], "vote": np.array(run["vote"])}
    if "drafted_vote" in run:
        found["drafted_vote"] = np.array(run["drafted_vote"])
    return found | {"game": np.array(run["game"]).mean(axis=0), "legal": np.array(run["legal"]).mean(axis=0)}


def beside_base(run: Run, base: Run) -> dict[str, object]:
    """Every policy beside the base model in the same seat with the same draws."""
    import numpy as np

    policies = []
    for name, own, other in zip(*(run["names"], run["test"], base["test"]), strict=True):  # type: ignore[call-overload]
        mine, theirs = np.array(own), np.array(other)
        wins = np.where(mine > theirs, 1.0, np.where(mine < theirs, 0.0, 0.5))
        policies.append(
            {
                "policy": name,
                "score": over_questions(mine),
                "gain": over_questions(mine - theirs, -1.0),
                "win_rate": over_questions(wins),
            }
        )
    return {
        "base_score": over_questions(np.array(base["test"]).mean(axis=0)),
        "policies": policies,
        "better_than_base": sum(one["gain"][1] > 0 for one in policies),
        "beat_frozen_base": sum(one["win_rate"][1] > 0.5 for one in policies),
    }


def summary(runs: Mapping[tuple[str, int], Run]) -> dict[str, object]:
    """Settings over their seeds, and each beside the policies that learned alone."""
    values = {name: measured(run) for name, run in runs.items()}
    settings = dict.fromkeys(setting for setting, _ in runs)
    found: dict[str, object] = {}
    for setting in settings:
        seeds = [seed for other, seed in runs if other == setting]
        own = {seed: values[setting, seed] for seed in seeds}
        control = {seed: values[_CONTROL, seed] for seed in seeds if (_CONTROL, seed) in values}
        found[setting] = {what: _row(what, own, control if setting != _CONTROL else {}) for what in own[seeds[0]]}
    return found


def _row(what: str, own: Mapping[int, Mapping], control: Mapping[int, Mapping]) -> dict[str, object]:  # type: ignore[type-arg]
    import numpy as np

    means = [float(values[what].mean()) for values in own.values()]
    row: dict[str, object] = {
        "seeds": [round(mean, 3) for mean in means],
        "median": round(median(means), 3),
        "minimum": round(min(means), 3),
        "maximum": round(max(means), 3),
        "mean": over_questions(np.mean([values[what] for values in own.values()], axis=0)),
    }
    if control and len(control) == len(own):
        differences = [own[seed][what] - control[seed][what] for seed in own]
        signs = {np.sign(difference.mean()) for difference in differences}
        total = over_questions(np.mean(differences, axis=0), -1.0)
        row["over_independent"] = total
        row["over_independent_seeds"] = [round(float(difference.mean()), 3) for difference in differences]
        # An interval over questions knows nothing of the luck of a run: all seeds must say the same, too.
        row["surely_different"] = bool((total[1] > 0 or total[2] < 0) and len(signs) == 1)
    return row


def report(work: Path, options: argparse.Namespace, config: ArenaConfig) -> None:
    """Write the result file from everything that is done so far."""
    runs = finished(work, options.all_seeds)
    if not runs:
        return
    costs = ("tokens", "iterations", "seconds", "processor_seconds", "tokens_an_answer", "evaluation_processor_seconds")
    single = {
        f"{setting}/{seed}": {
            **{cost: run[cost] for cost in costs if cost in run},
            **(beside_base(run, runs[_BASE, seed]) if setting != _BASE and (_BASE, seed) in runs else {}),
        }
        for (setting, seed), run in runs.items()
    }
    first = next(iter(runs.values()))
    results = {
        "task": config.task.model_dump(),
        "policies": config.policies.model_dump(),
        "learning": asdict(config.learning),
        "test_questions": len(first["vote"]),  # type: ignore[arg-type]
        "validation_questions": len(first["validation"][0]),  # type: ignore[index]
        "settings": summary(runs),
        "runs": single,
    }
    arguments = vars(options) | {"work": "FOLDER", "config": options.config.name}
    write_result(options.name, results, arguments, options.all_seeds)


def table(runs: Mapping[tuple[str, int], Run]) -> Iterator[str]:
    """The summary for people."""
    for setting, rows in summary(runs).items():
        for what, row in rows.items():  # type: ignore[attr-defined]
            over = row.get("over_independent", "")
            mark = " *" if row.get("surely_different") else ""
            yield f"{setting:12} {what:13} seeds {row['seeds']} mean {row['mean']} over independent {over}{mark}"


def prepared(work: Path, config: ArenaConfig, measures: Measures) -> None:
    """Refuse a folder with runs of other measures."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "measures.json"
    wanted = {"measures": asdict(measures), "config": config.model_dump(mode="json")}
    if path.exists() and (there := json.loads(path.read_text())) != wanted:
        raise SystemExit(f"{work} holds runs of {there}, asked for were {wanted}; take another --work")
    path.write_text(json.dumps(wanted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs; what is done there stays done")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--config", type=Path, default=ROOT / "demo" / "arena.toml", help="task and learning")
    parser.add_argument("--tokens", type=int, default=10_000, help="sampled tokens of a run")
    parser.add_argument("--questions", type=int, default=200, help="different held-out questions")
    parser.add_argument("--validation", type=int, default=50, help="how many of them only choose the best policy")
    parser.add_argument("--drafted", type=int, default=60, help="questions that are also voted on after drafts")
    parser.add_argument("--game", default="TicTacToe-v0", help="a TextArena game for two that nobody trains on")
    parser.add_argument("--deals", type=int, default=6, help="deals of the game, each in both seatings")
    parser.add_argument("--name", default="arena_modes", help="name of the result file")
    options = parser.parse_args()
    pin_threads()
    from lib.arena_modes import Measures

    from fedmoe.arena.config import read_config
    from fedmoe.runtime.logs import configure

    configure()
    config = read_config(options.config)
    measures = Measures(
        *(options.tokens, options.questions, options.validation, options.drafted), options.game, options.deals
    )
    prepared(options.work, config, measures)
    options.all_seeds = sorted(set(options.seeds))
    for seed in options.seeds:
        for setting in (_BASE, *options.settings):
            do(options.work, config, measures, setting, seed)
            report(options.work, options, config)
    print("\n".join(table(finished(options.work, options.all_seeds))))


if __name__ == "__main__":
    main()
