"""What one iteration says to the records; the formulas are those of docs/metrics.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedmoe.arena.learning.learner import PolicyUpdate
from fedmoe.arena.learning.policies import Policies
from fedmoe.arena.modes.memory import ModeMemory
from fedmoe.arena.modes.protocol import ArenaDecision, Judgement, SeatResult
from fedmoe.arena.rollout.episodes import PlayedEpisode
from fedmoe.arena.rollout.evaluate import Comparison, FrontRunner
from fedmoe.runtime.records import RecordValue


class Records(Protocol):
    """Takes records."""

    def write(self, kind: str, **values: RecordValue) -> None:
        """Keep one record."""
        ...


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
class Report:
    """Everything there is to say about one iteration."""

    iteration: int
    mode: str
    played: Sequence[PlayedEpisode]
    judged: Judgement
    updates: Mapping[str, PolicyUpdate]
    staleness: Mapping[str, int]
    timing: Timing


def write_iteration(records: Records, report: Report, policies: Policies, society: ModeMemory) -> None:
    """One record a policy and kind, and those of the whole."""
    for name in policies.names:
        _write_policy(records, report, policies, name)
        _write_credit(records, report, name)
        if name in society.ratings:
            rating = society.ratings[name]
            records.write(
                "rating",
                iteration=report.iteration,
                policy=name,
                mu=rating.mu,
                sigma=rating.sigma,
                games=rating.games,
            )
    for decision in report.judged.decisions:
        write_decision(records, report.iteration, report.mode, decision)
    _write_whole(records, report)


def write_decision(records: Records, iteration: int, mode: str, decision: ArenaDecision) -> None:
    """One decision with its reason."""
    records.write(
        "decision",
        iteration=iteration,
        mode=mode,
        policy=decision.policy,
        what=decision.what,
        before=decision.before,
        after=decision.after,
        reason=decision.reason,
    )


def write_leader(records: Records, iteration: int, mode: str, found: FrontRunner) -> None:
    """Whose held-out score is the best, and whether it is surely so."""
    records.write(
        "leader",
        iteration=iteration,
        mode=mode,
        policy=found.policy,
        apart=found.apart,
        rival=found.rival,
        lead=found.lead.mean,
        lead_low=found.lead.low,
        lead_high=found.lead.high,
        questions=found.questions,
    )


def write_skipped(records: Records, iteration: int, where: str, episodes: int, reason: str) -> None:
    """How many episodes of an iteration or of an evaluation failed and were left out, and why the first did."""
    records.write("skipped", iteration=iteration, where=where, episodes=episodes, reason=reason)


def write_comparison(records: Records, iteration: int, mode: str, found: Comparison, version: int) -> None:
    """One held-out comparison."""
    records.write(
        "evaluation",
        iteration=iteration,
        mode=mode,
        policy=found.policy,
        version=version,
        opponent=found.opponent,
        episodes=found.episodes,
        questions=found.questions,
        few=found.few,
        failed=found.failed,
        valid=found.valid,
        score=found.score.mean,
        low=found.score.low,
        high=found.score.high,
        base_score=found.base.mean,
        base_low=found.base.low,
        base_high=found.base.high,
        gain=found.gain.mean,
        gain_low=found.gain.low,
        gain_high=found.gain.high,
        win_rate=found.wins.mean,
        win_low=found.wins.low,
        win_high=found.wins.high,
    )


def rewards_of(results: Sequence[SeatResult]) -> dict[str, float]:
    """The mean reward of every policy."""
    found: dict[str, list[float]] = {}
    for result in results:
        found.setdefault(result.policy, []).append(result.credit.reward)
    return {name: sum(values) / len(values) for name, values in found.items()}


def accuracies(played: Sequence[PlayedEpisode]) -> dict[str, float]:
    """The mean seat score of every learning policy, in [0, 1]."""
    found: dict[str, list[float]] = {}
    for episode in played:
        for player, score in zip(episode.plan.players, episode.outcome.seat_scores, strict=True):
            if player.learning:
                found.setdefault(player.name, []).append(score)
    return {name: sum(values) / len(values) for name, values in found.items()}


def sampled_tokens(played: Sequence[PlayedEpisode]) -> int:
    """How many tokens all players sampled."""
    return sum(len(turn.tokens) for episode in played for turn in episode.turns)


def pace(iterations: Sequence[tuple[int, float]]) -> float | None:
    """Tokens a second over iterations of so many tokens and seconds: the ratio of the sums.

    A mean of ratios is that of the shortest iteration, whose episodes were sampled beside the one before.
    """
    seconds = sum(one for _, one in iterations)
    return sum(tokens for tokens, _ in iterations) / seconds if seconds else None


def ended_share(episode: PlayedEpisode, seat: int) -> float:
    """Which share of a seat's actions ended before the limit of tokens; 1 for a seat that did not act."""
    ended = [turn.stopped for turn in episode.turns if turn.seat == seat]
    return sum(ended) / len(ended) if ended else 1.0


def _write_policy(records: Records, report: Report, policies: Policies, name: str) -> None:
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


def _write_credit(records: Records, report: Report, name: str) -> None:
    parts = [result.credit.parts for result in report.judged.results if result.policy == name]
    if parts:
        records.write(
            "credit",
            iteration=report.iteration,
            policy=name,
            shared=_mean([part.shared for part in parts]),
            difference=_mean([part.difference for part in parts]),
            individual=_mean([part.individual for part in parts]),
            versus=_mean([part.versus for part in parts]),
        )


def _write_whole(records: Records, report: Report) -> None:
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
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
