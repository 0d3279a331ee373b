"""Sample records of an arena run: made-up learning curves, to see the charts before anything is trained.

Every record is marked `sample`; whatever is drawn from them says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fedmoe.runtime.records import Record, RecordValue

_NAMES = ("solver", "checker", "planner", "critic", "scout", "judge", "builder", "skeptic")
#: Of a policy's start, end, speed and tokens.
_RANGES = ((0.12, 0.3), (0.55, 0.92), (2.5, 6.0), (9e3, 2.2e4))
_MODES = ("cooperative", "competitive", "team_battle")
_SECONDS = 14.0
_EVALUATE_EVERY = 10
_EPISODES = 200
_GIB = 2.0**30


@dataclass(slots=True)
class _Policy:
    """One made-up policy: how good it starts and ends, how fast it gets there, and its rating."""

    name: str
    start: float
    end: float
    speed: float
    tokens: float
    learning_rate: float = 2e-4
    mu: float = 25.0
    sigma: float = 25 / 3
    noise: float = 0.0
    version: int = 0

    def skill(self, share: float) -> float:
        """Chance of a right answer after `share` of the run."""
        return self.start + (self.end - self.start) * (1 - math.exp(-self.speed * share))


def sample_records(policies: int = 4, iterations: int = 120, seed: int = 0, started: float = 0.0) -> list[Record]:
    """All records of a made-up run in mixed mode, in order of time; equal arguments give equal records.

    `started` is its first moment in seconds since 1970. Raises ValueError unless 1 <= policies <= 8, iterations >= 1.
    """
    if not 1 <= policies <= len(_NAMES) or iterations < 1:
        raise ValueError(f"1 to {len(_NAMES)} policies and at least 1 iteration, got {policies} and {iterations}")
    rng = np.random.default_rng(seed)
    players = []
    for name in _NAMES[:policies]:
        start, end, speed, tokens = (float(rng.uniform(*limits)) for limits in _RANGES)
        players.append(_Policy(name, start, end, speed, tokens))
    run = {"kind": "run", "task": "sample:arithmetic", "mode": "mixed", "base_model": "sample"}
    named: Record = {**run, "policies": ",".join(_NAMES[:policies]), "iterations": iterations}
    records: list[Record] = [{"at": started, "sample": True, "seed": seed, **named}]
    for iteration in range(iterations):
        at = started + _SECONDS * (iteration + 1)
        values = _iteration(players, iteration, iterations, rng)
        records += [
            {"at": round(at + 0.01 * place, 3), "sample": True, **record} for place, record in enumerate(values)
        ]
    return records


def _share(value: float) -> float:
    return float(np.clip(value, 0, 1))


def _mode(iteration: int, iterations: int) -> str:
    return _MODES[min(iteration * 4 // iterations, 3) % 3]


def _iteration(players: list[_Policy], iteration: int, iterations: int, rng: np.random.Generator) -> Iterator[Record]:
    share = iteration / max(iterations - 1, 1)
    head: dict[str, RecordValue] = {"iteration": iteration, "mode": _mode(iteration, iterations)}
    seconds = _SECONDS * float(rng.normal(1, 0.06))
    for player in players:
        player.noise = 0.7 * player.noise + float(rng.normal(0, 0.022))
    rewards = [_share(player.skill(share) + player.noise) for player in players]
    tokens = 0
    for player, reward in zip(players, rewards, strict=True):
        record = _policy_record(player, reward, share, seconds, rng)
        tokens += int(str(record["tokens"]))
        yield {**head, "kind": "policy", **record}
        yield {"iteration": iteration, "kind": "credit", "policy": player.name, **_credit(reward, rewards, rng)}
        yield {"iteration": iteration, "kind": "rating", "policy": player.name, **_rating(player, players, share, rng)}
    yield {
        **head,
        "kind": "team",
        "cooperation": float(0.03 + 0.16 * (1 - math.exp(-3 * share)) + rng.normal(0, 0.012)),
        "completion": _share(0.72 + 0.26 * (1 - math.exp(-5 * share)) + rng.normal(0, 0.01)),
        "utilisation": _share(0.84 + rng.normal(0, 0.03)),
        "team_score": _share(max(rewards) + 0.04 + rng.normal(0, 0.015)),
    }
    parts = {"rollout_seconds": 0.62 * seconds, "learn_seconds": 0.34 * seconds, "iteration_seconds": seconds}
    speed = {"tokens": tokens, "tokens_per_second": tokens / seconds}
    yield {"iteration": iteration, "kind": "timing", **parts, **speed}
    yield {
        "kind": "system",
        "cpu_percent": float(np.clip(rng.normal(63, 6), 0, 100)),
        "memory_percent": 31 + 7 * share + float(rng.normal(0, 0.4)),
        "process_bytes": int((5.2 + 1.6 * share) * _GIB),
        "memory_limit_bytes": int(32 * _GIB),
        "gpu_percent": float(np.clip(rng.normal(82, 5), 0, 100)),
        "gpu_memory_bytes": int(11.5 * _GIB),
        "disk_percent": 41 + 2 * share,
        "disk_free_bytes": int((240 - 8 * share) * _GIB),
    }
    yield from _decisions(players, iteration, iterations, head)
    if iteration % _EVALUATE_EVERY == _EVALUATE_EVERY - 1 or iteration == iterations - 1:
        yield from ({**head, "kind": "evaluation", **_evaluation(player, share, rng)} for player in players)
        if len(players) > 1:
            yield {**head, "kind": "leader", **_leader(players, share)}


def _policy_record(
    player: _Policy, reward: float, share: float, seconds: float, rng: np.random.Generator
) -> dict[str, RecordValue]:
    # Answers get shorter while they get better, as they do when wrong ones ramble on.
    tokens = int(player.tokens * (1 - 0.45 * (1 - math.exp(-3 * share))) * float(rng.normal(1, 0.05)))
    player.version += 1
    return {
        "policy": player.name,
        "reward": reward,
        "tokens": tokens,
        "episodes": 64,
        "turns": 64,
        "accuracy": _share(reward + rng.normal(0.02, 0.02)),
        "ended": _share(1 - 0.5 * math.exp(-5 * share)),
        "valid": _share(1 - 0.35 * math.exp(-7 * share) + rng.normal(0, 0.01)),
        "efficiency_second": reward / seconds,
        "efficiency_token": 1000 * reward / tokens,
        "loss": float(0.05 * math.exp(-2 * share) + rng.normal(0, 0.01)),
        "kl": float(max(0.0, 0.09 * (1 - math.exp(-2.2 * share)) + rng.normal(0, 0.006))),
        "entropy": float(0.35 + 0.95 * math.exp(-2.6 * share * player.speed / 4) + rng.normal(0, 0.02)),
        "grad_norm": float(0.4 + 0.5 * math.exp(-2 * share) + abs(rng.normal(0, 0.05))),
        "learning_rate": player.learning_rate,
        "staleness": int(rng.integers(0, 3)),
        "version": player.version,
        "weight_updates": player.version,
        "gap": float(abs(rng.normal(0.012, 0.004))),
        "clip_fraction": _share(rng.normal(0.04, 0.01)),
    }


def _credit(reward: float, rewards: list[float], rng: np.random.Generator) -> dict[str, RecordValue]:
    mean = sum(rewards) / len(rewards)
    return {
        "shared": mean,
        "difference": 0.6 * (reward - mean) + 0.05 + float(rng.normal(0, 0.015)),
        "individual": reward,
        "versus": reward - mean + float(rng.normal(0, 0.02)),
    }


def _rating(player: _Policy, players: list[_Policy], share: float, rng: np.random.Generator) -> dict[str, RecordValue]:
    mean = sum(other.skill(share) for other in players) / len(players)
    player.mu += 0.08 * (25 + 22 * (player.skill(share) - mean) - player.mu) + float(rng.normal(0, 0.12))
    player.sigma = 1.1 + (player.sigma - 1.1) * 0.965
    return {"mu": player.mu, "sigma": player.sigma, "games": 16 * player.version}


def _evaluation(player: _Policy, share: float, rng: np.random.Generator) -> dict[str, RecordValue]:
    score, base = _measured(player.skill(share), rng), _measured(player.start, rng)
    win = _measured(_share(0.5 + 0.75 * (player.skill(share) - player.start)), rng)
    names = ("score", "low", "high", "base_score", "base_low", "base_high", "win_rate", "win_low", "win_high")
    values: dict[str, RecordValue] = dict(zip(names, (*score, *base, *win), strict=True))
    counts = {"episodes": _EPISODES, "questions": _EPISODES, "few": False}
    return {"policy": player.name, "opponent": "base model"} | counts | values


def _leader(players: list[_Policy], share: float) -> dict[str, RecordValue]:
    first, second = sorted(players, key=lambda player: -player.skill(share))[:2]
    lead, half = first.skill(share) - second.skill(share), 1.96 * math.sqrt(0.5 / _EPISODES)
    interval = {"lead": lead, "lead_low": lead - half, "lead_high": lead + half}
    return {"policy": first.name, "apart": lead > half, "rival": second.name, **interval, "questions": _EPISODES}


def _measured(chance: float, rng: np.random.Generator) -> tuple[float, float, float]:
    """A share of successes with its 95 % Wilson interval."""
    share, z = rng.binomial(_EPISODES, chance) / _EPISODES, 1.96
    centre = (share + z * z / (2 * _EPISODES)) / (1 + z * z / _EPISODES)
    half = z * math.sqrt(share * (1 - share) / _EPISODES + (z / (2 * _EPISODES)) ** 2) / (1 + z * z / _EPISODES)
    return share, max(0.0, centre - half), min(1.0, centre + half)


def _decisions(
    players: list[_Policy], iteration: int, iterations: int, head: dict[str, RecordValue]
) -> Iterator[dict[str, RecordValue]]:
    mode = _mode(iteration, iterations)
    before = _mode(iteration - 1, iterations) if iteration else mode
    reason = {"competitive": "plateau", "team_battle": "dominance"}.get(mode, "diversity fell")
    decision: dict[str, RecordValue] = {**head, "kind": "decision"}
    if before != mode:
        yield {**decision, "policy": "", "what": "mode", "before": before, "after": mode, "reason": reason}
    for place, player in enumerate(players):
        if iteration == int(iterations * (0.3 + 0.09 * place)) and iteration:
            old, player.learning_rate = player.learning_rate, player.learning_rate / 2
            change: dict[str, RecordValue] = {"what": "learning rate", "before": old, "after": player.learning_rate}
            yield {**decision, "policy": player.name, "reason": "no gain", **change}
    if iteration == int(iterations * 0.7) and iteration and len(players) > 1:
        weakest, *_, best = sorted(players, key=lambda player: player.mu)
        change = {"what": "survival", "before": weakest.name, "after": f"copy of {best.name}"}
        yield {**decision, "policy": weakest.name, "reason": "intervals separate", **change}
