"""The records of an iteration and of an evaluation; the formulas are those of docs/metrics.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from fedmoe.arena.learning.learner import PolicyUpdate
from fedmoe.arena.learning.policies import Policies
from fedmoe.arena.modes.memory import ModeMemory
from fedmoe.arena.modes.protocol import ArenaDecision, Judgement
from fedmoe.arena.rollout.episodes import PlayedEpisode
from fedmoe.arena.rollout.evaluate import Comparison, FrontRunner
from fedmoe.arena.rollout.interval import MeanInterval
from fedmoe.runtime.records import Recorder, RecordValue

_CREDIT = ("shared", "difference", "individual", "versus")


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of an iteration: sampling (perhaps beside the one before), learning, and all of it on the wall.

    `tokens` were sampled for it; `pace` is that of the latest iterations in tokens a second.
    """

    rollout: float
    learn: float
    iteration: float
    lanes: int
    tokens: int
    pace: float | None


@dataclass(frozen=True)
class IterationReport:
    """Everything there is to say about one iteration."""

    iteration: int
    mode: str
    played: Sequence[PlayedEpisode]
    judged: Judgement
    updates: Mapping[str, PolicyUpdate]
    staleness: Mapping[str, int]
    timing: Timing


def write_iteration(records: Recorder, report: IterationReport, policies: Policies, memory: ModeMemory) -> None:
    """One record a policy and kind, and those of the whole."""
    for name in policies.names:
        _write_policy(records, report, policies, name)
        _write_credit(records, report, name)
        if name in memory.ratings:
            rating = memory.ratings[name]
            values = {"mu": rating.mu, "sigma": rating.sigma, "games": rating.games}
            records.write("rating", iteration=report.iteration, policy=name, **values)
    for decision in report.judged.decisions:
        write_decision(records, report.iteration, report.mode, decision)
    _write_whole(records, report)


def write_decision(records: Recorder, iteration: int, mode: str, decision: ArenaDecision) -> None:
    """One decision with its reason."""
    records.write("decision", iteration=iteration, mode=mode, **asdict(decision))


def write_leader(records: Recorder, iteration: int, mode: str, leader: FrontRunner) -> None:
    """Whose held-out score is the best, and whether it is surely so."""
    records.write(
        "leader",
        iteration=iteration,
        mode=mode,
        policy=leader.policy,
        apart=leader.apart,
        rival=leader.rival,
        **_bounds(leader.lead, "lead", "lead_low", "lead_high"),
        questions=leader.questions,
    )


def write_comparison(records: Recorder, iteration: int, mode: str, comparison: Comparison, version: int) -> None:
    """One held-out comparison."""
    records.write(
        "evaluation",
        iteration=iteration,
        mode=mode,
        policy=comparison.policy,
        version=version,
        opponent=comparison.opponent,
        episodes=comparison.episodes,
        questions=comparison.questions,
        few=comparison.few,
        failed=comparison.failed,
        valid=comparison.valid,
        **_bounds(comparison.score, "score", "low", "high"),
        **_bounds(comparison.base, "base_score", "base_low", "base_high"),
        **_bounds(comparison.gain, "gain", "gain_low", "gain_high"),
        **_bounds(comparison.wins, "win_rate", "win_low", "win_high"),
    )


def _bounds(interval: MeanInterval, mean: str, low: str, high: str) -> dict[str, float]:
    return {mean: interval.mean, low: interval.low, high: interval.high}


def accuracies(played: Sequence[PlayedEpisode]) -> dict[str, float]:
    """The mean seat score of every learning policy, in [0, 1]."""
    scores: dict[str, list[float]] = {}
    for episode in played:
        for player, score in zip(episode.plan.players, episode.outcome.seat_scores, strict=True):
            if player.learning:
                scores.setdefault(player.name, []).append(score)
    return {name: sum(values) / len(values) for name, values in scores.items()}


def pace(iterations: Sequence[tuple[int, float]]) -> float | None:
    """Tokens a second over iterations of so many tokens and seconds: the ratio of the sums.

    A mean of ratios is that of the shortest iteration, whose episodes were sampled beside the one before.
    """
    seconds = sum(duration for _, duration in iterations)
    return sum(tokens for tokens, _ in iterations) / seconds if seconds else None


def ended_share(episode: PlayedEpisode, seat: int) -> float:
    """Which share of a seat's actions ended before the limit of tokens; 1 for a seat that did not act."""
    ended = [turn.stopped for turn in episode.turns if turn.seat == seat]
    return sum(ended) / len(ended) if ended else 1.0


def _write_policy(records: Recorder, report: IterationReport, policies: Policies, name: str) -> None:
    own = [result for result in report.judged.results if result.policy == name]
    if not own:
        return
    seats = [(report.played[result.episode], result.seat) for result in own]
    turns = [turn for episode, seat in seats for turn in episode.turns if turn.seat == seat]
    tokens = sum(len(turn.tokens) for turn in turns)
    reward = sum(result.credit.reward for result in own)
    update = report.updates.get(name)
    learned: dict[str, RecordValue] = {}
    if update is not None:
        learned = {
            "loss": update.loss,
            "kl": update.moved,
            "entropy": update.entropy,
            "grad_norm": update.gradient_norm,
            "clip_fraction": update.statistics.clip_fraction,
            "gap": update.statistics.gap_mean,
        }
    records.write(
        "policy",
        iteration=report.iteration,
        mode=report.mode,
        policy=name,
        reward=reward / len(own),
        accuracy=accuracies(report.played)[name],
        valid=_mean([episode.outcome.valid[seat] for episode, seat in seats]),
        ended=_mean([ended_share(episode, seat) for episode, seat in seats]),
        episodes=len(own),
        turns=len(turns),
        tokens=tokens,
        efficiency_second=reward / report.timing.iteration if report.timing.iteration else None,
        efficiency_token=1000.0 * reward / tokens if tokens else None,
        learning_rate=policies.learner.learning_rate(name),
        staleness=report.staleness.get(name, 0),
        version=policies.version(name),
        weight_updates=policies.updates(name),
        **learned,
    )


def _write_credit(records: Recorder, report: IterationReport, policy: str) -> None:
    parts = [result.credit.parts for result in report.judged.results if result.policy == policy]
    if parts:
        means = {name: _mean([getattr(part, name) for part in parts]) for name in _CREDIT}
        records.write("credit", iteration=report.iteration, policy=policy, **means)


def _write_whole(records: Recorder, report: IterationReport) -> None:
    outcomes = [episode.outcome for episode in report.played]
    timing = report.timing
    busy = (timing.rollout + timing.learn) / (timing.iteration * timing.lanes) if timing.iteration else 0.0
    records.write(
        "team",
        iteration=report.iteration,
        mode=report.mode,
        cooperation=_mean([result.credit.parts.difference for result in report.judged.results]),
        completion=_mean([float(outcome.completed) for outcome in outcomes]),
        utilisation=min(1.0, busy),
        team_score=_mean([score for outcome in outcomes for score in outcome.team_scores]),
    )
    records.write(
        "timing",
        iteration=report.iteration,
        rollout_seconds=timing.rollout,
        learn_seconds=timing.learn,
        iteration_seconds=timing.iteration,
        tokens=timing.tokens,
        tokens_per_second=timing.pace,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
