"""Does learning show? Every mode from untrained adapters, several seeds, held-out episodes, 95 % intervals.

    python benchmarks/bench_arena_learning.py [--seeds 0 1 2] [--iterations 16] [--modes competitive ...]

One (mode, seed) run gives, for each of four policies: its score and the base model's on the same held-out problems,
the paired difference, and the share of points against the frozen base. In games the score is the share of points
against a player that moves at random, and `valid` the share of legal moves. Beside that: what a deliberately useless
team-mate earns by difference reward among the trained ones, and whether ratings put players of known strength in order.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lib.harness import pin_threads, write_result

if TYPE_CHECKING:
    from fedmoe.arena.config import ArenaConfig

MODES = ("competitive", "cooperative", "team_battle", "mixed")
TASKS: dict[str, tuple[str, dict[str, int]]] = {
    # That of demo/arena.toml; one-digit products have 13 held-out questions in all.
    "reversal": ("committee:word_sequence_reversal", {"min_words": 2, "max_words": 3}),
    "products": ("committee:products", {"min_digits": 1, "max_digits": 1}),
    "chain_sum": ("committee:chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    "tictactoe": ("textarena:TicTacToe-v0", {}),
    "pigdice": ("textarena:PigDice-v0-short", {}),
}
CHOICES = (
    "valid",
    "questions",
    "score",
    "low",
    "high",
    "base_score",
    "gain",
    "gain_low",
    "gain_high",
    "win_rate",
    "win_low",
    "win_high",
)


def run_mode(mode: str, seed: int, options: argparse.Namespace) -> dict[str, object]:
    """One mode from untrained adapters; the last held-out comparison of every policy with the base model."""
    from fedmoe.arena.config import ArenaConfig
    from fedmoe.arena.run.options import RunOptions, Stop
    from fedmoe.arena.run.run import METRICS, run_arena
    from fedmoe.runtime.records import read_records

    task, task_options = TASKS[options.task]
    config = ArenaConfig.model_validate(
        {
            "seed": seed,
            "task": {"name": task, "options": task_options},
            "learning": {"groups": options.groups, "samples": options.samples, "learning_rate": options.rate},
            "evaluation": {"episodes": options.episodes},
            "checkpoint": {"every": options.iterations},
            "phases": [{"mode": mode, "iterations": options.iterations}],
        }
    )
    with tempfile.TemporaryDirectory(prefix="arena-learning-") as folder:
        run_arena(config, RunOptions(Path(folder)), Stop())
        records = list(read_records(Path(folder) / METRICS))
        useless = useless_team_mate(Path(folder), config, seed) if mode in ("cooperative", "team_battle") else None
    against_base = [one for one in records if one["kind"] == "evaluation" and one["opponent"] == "base"]
    last = {one["policy"]: one for one in against_base}
    policies = {str(name): {key: one[key] for key in CHOICES} for name, one in last.items()}
    found = {
        "policies": policies,
        "better_than_base": sum(float(str(one["gain_low"])) > 0 for one in policies.values()),
        "beat_frozen_base": sum(float(str(one["win_low"])) > 0.5 for one in policies.values()),
        # A new adapter changes nothing, so the first evaluation's share of usable actions is the base model's.
        "base_valid": against_base[0]["valid"],
        "seconds": sum(float(str(one["iteration_seconds"])) for one in records if one["kind"] == "timing"),
    }
    return found if useless is None else {**found, "useless_team_mate": useless}


def useless_team_mate(folder: Path, config: ArenaConfig, seed: int) -> dict[str, object]:
    """Three trained policies and one that guesses in a committee: the mean difference reward of each, 60 problems."""
    import numpy as np

    from fedmoe.arena.modes.credit import decompose
    from fedmoe.arena.rollout.chat import ChatCodec
    from fedmoe.arena.rollout.episodes import EpisodePlan, Player
    from fedmoe.arena.rollout.evaluate import CHANCE
    from fedmoe.arena.rollout.interval import MeanInterval
    from fedmoe.arena.rollout.play import play
    from fedmoe.arena.run.checkpoint import load_newest
    from fedmoe.arena.tasks.registry import make_task
    from fedmoe.arena.tasks.task import HELD_OUT, Lineup
    from fedmoe.inference.engine import AdapterKey
    from fedmoe.inference.transformers_engine import TransformersEngine
    from fedmoe.models.base import load_base
    from fedmoe.models.multilora import MultiLora

    loaded = load_newest(folder / "checkpoints")
    assert loaded is not None
    base = load_base("smollm2")
    engine = TransformersEngine(base, MultiLora(base.model))
    newest: dict[str, AdapterKey] = {}
    for text, adapter in loaded.state.adapters.items():
        key = AdapterKey(text.rpartition("@")[0], int(text.rpartition("@")[2]))
        engine.load(key, adapter)
        newest[key.name] = max(newest.get(key.name, key), key)
    team = [Player(name, key) for name, key in sorted(newest.items())[:3]]
    task = make_task(config.task.name, config.task.options)
    plans = [
        EpisodePlan(HELD_OUT + 5000 + index, Lineup.together(4, "independent"), (*team, CHANCE), index)
        for index in range(60)
    ]
    played = play(task, plans, engine, ChatCodec(base.tokenizer), seed)
    parts = [decompose(one.outcome, one.plan.lineup) for one in played]
    found: dict[str, object] = {}
    for seat, player in enumerate((*team, CHANCE)):
        values = np.array([part[seat].difference or 0.0 for part in parts])
        interval = MeanInterval.of(values, [one.question for one in played], (-1.0, 1.0))
        found["useless" if player is CHANCE else player.name] = {
            "difference": interval.mean,
            "low": interval.low,
            "high": interval.high,
        }
    engine.close()
    return found


def known_strengths(seeds: Sequence[int], games: int) -> dict[str, object]:
    """Ratings of TicTacToe players that play the scripted move with probability 0, 1/3, 2/3, 1 and else at random."""
    import numpy as np

    from fedmoe.arena.population.rating import Ratings
    from fedmoe.arena.tasks.task import Lineup
    from fedmoe.arena.tasks.textarena_games import TextArenaTask

    task = TextArenaTask("TicTacToe-v0")
    players = {"random": 0.0, "one_third": 1 / 3, "two_thirds": 2 / 3, "scripted": 1.0}
    right, tables = 0, []
    for seed in seeds:
        rng, ratings = np.random.default_rng(seed), Ratings()
        for name in players:
            ratings.ensure(name)
        for _ in range(games):
            pair = [str(name) for name in rng.permutation(list(players))[:2]]
            episode = task.start(int(rng.integers(1 << 30)), Lineup.alone(2))
            while seats := episode.to_act():
                chosen = {}
                for seat in seats:
                    scripted = rng.random() < players[pair[seat]]
                    act = task.scripted_action if scripted else task.random_action
                    chosen[seat] = act(episode, seat, rng)
                episode.act(chosen)
            ratings.rate([[pair[0]], [pair[1]]], episode.outcome().seat_scores)
        ranked = sorted(ratings.players.items(), key=lambda entry: (-entry[1].mu, entry[0]))
        order = [name for name, _ in ranked]
        right += order == sorted(players, key=lambda name: -players[name])
        tables.append({name: [round(rating.mu, 2), round(rating.sigma, 2)] for name, rating in ranked})
    return {"games": games, "runs": len(seeds), "in_true_order": right, "ratings": tables}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--task", choices=TASKS, default="reversal", help="what is played")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--groups", type=int, default=10)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--episodes", type=int, default=220)
    parser.add_argument("--ratings", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--name", default="arena_learning", help="name of the result file")
    options = parser.parse_args()
    pin_threads()
    results: dict[str, object] = {"known_strengths": known_strengths(range(10), 200)} if options.ratings else {}
    for mode in options.modes:
        for seed in options.seeds:
            results[f"{mode}/{seed}"] = found = run_mode(mode, seed, options)
            print(mode, seed, summary(found), flush=True)
            # After every run: an hour's work must not hang on the last minute.
            write_result(options.name, results, vars(options), options.seeds)


def summary(found: Mapping[str, object]) -> str:
    policies = found["policies"]
    assert isinstance(policies, Mapping)
    scores = ", ".join(f"{one['base_score']:.2f}->{one['score']:.2f}" for one in policies.values())
    return f"better {found['better_than_base']}/4, beat base {found['beat_frozen_base']}/4: {scores}"


if __name__ == "__main__":
    main()
