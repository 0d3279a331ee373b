"""Mode switching in mixed mode: chooses the next mode from measured learning progress, and states the reason."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

COOPERATIVE = "cooperative"
COMPETITIVE = "competitive"
TEAM_BATTLE = "team_battle"
MODES = (COOPERATIVE, COMPETITIVE, TEAM_BATTLE)

Trigger = Literal["exploration", "stay", "dominance", "diversity", "progress", "plateau"]

#: Where a policy that beats all others still learns: beside weaker ones, not against them.
_AGAINST_DOMINANCE = (TEAM_BATTLE, COOPERATIVE)
#: Where it pays to answer otherwise than the others.
_AGAINST_SAMENESS = (COMPETITIVE, COOPERATIVE)
#: Dominance is over when the intervals overlap by so many rating points: about what a few games move them.
_OVERLAP = 1.0


@dataclass(frozen=True, slots=True)
class SwitchRules:
    """When to change the mode; iterations are the trainer's, scores and agreement lie in [0, 1].

    `exploration`: so many iterations at first are divided evenly among all modes, in order. `min_stay`: least number
    of iterations between two switches. `window`: so many last scores of a stay give its slope. `margin`: how much
    more slope (score per iteration) another mode must have had. `plateau`: a slope below this is none. `agreement`:
    the share of equal answers from which diversity counts as lost, until it is `relief` below.
    """

    exploration: int = 30
    min_stay: int = 10
    window: int = 10
    margin: float = 0.002
    plateau: float = 0.001
    agreement: float = 0.9
    relief: float = 0.05

    def __post_init__(self) -> None:
        if self.min_stay < 1 or self.window < 3 or self.exploration < 0:
            raise ValueError(f"min_stay is at least 1, window at least 3, exploration at least 0, got {self}")
        if not (self.margin >= 0 and self.relief >= 0 and math.isfinite(self.plateau) and 0 < self.agreement <= 1):
            raise ValueError(f"margin and relief are at least 0 and agreement lies in (0, 1], got {self}")


@dataclass(frozen=True, slots=True)
class Measurement:
    """Measurements of one iteration.

    `score`: the policies' mean held-out score against frozen opponents, in [0, 1] (never self-play reward).
    `lead`: the lower end of the leader's rating interval less the highest upper end of the others, rating points;
    positive when `leader` is surely the strongest. `agreement`: the share of problems that policies answer alike.
    """

    score: float
    leader: str
    lead: float
    agreement: float

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) for value in (self.score, self.lead, self.agreement)):
            raise ValueError(f"measurements must be finite numbers, got {self}")


@dataclass(frozen=True, slots=True)
class SwitchDecision:
    """The mode of the next iteration, what led to it, and the reason in words with the numbers, for the records."""

    iteration: int
    before: str
    after: str
    trigger: Trigger
    reason: str

    @property
    def switched(self) -> bool:
        """Whether the mode changes."""
        return self.before != self.after


def agreement(answers: Sequence[Sequence[str]]) -> float:
    """The mean share of pairs of policies with equal answers; `answers` has one row a problem, one answer a policy."""
    if not answers or any(len(row) < 2 for row in answers):
        raise ValueError(f"agreement needs problems answered by two or more policies, got {len(answers)} problems")
    shares = [
        sum(count * (count - 1) for count in Counter(row).values()) / (len(row) * (len(row) - 1)) for row in answers
    ]
    return sum(shares) / len(shares)


@dataclass
class ModeSwitch:
    """Chooses among modes by learning progress: the least-squares slope of the score within a stay.

    Progress is signed, not absolute as in curricula over tasks (Oudeyer et al. 2007, Matiisen et al. 2017), where
    a falling score calls for practising that task again: here one held-out score is watched whatever the mode, and
    a mode under which it falls is a mode to leave. Dominance and lost diversity bar the modes that feed them until
    they are over. Nothing is final: every mode can come back.
    """

    modes: tuple[str, ...] = MODES
    rules: SwitchRules = SwitchRules()
    iteration: int = 0
    #: The mode to play now.
    mode: str = ""
    stay: list[float] = field(default_factory=list)
    slopes: dict[str, float] = field(default_factory=dict)
    left_at: dict[str, int] = field(default_factory=dict)
    dominated: bool = False
    alike: bool = False

    def __post_init__(self) -> None:
        if len(self.modes) < 2 or len(set(self.modes)) != len(self.modes):
            raise ValueError(f"switching needs two or more different modes, got {list(self.modes)}")
        if 0 < (exploration := self.rules.exploration) < len(self.modes):
            raise ValueError(f"{exploration} iterations of exploration cannot visit {len(self.modes)} modes")
        self.mode = self.mode or self.modes[0]

    def step(self, measured: Measurement) -> SwitchDecision:
        """Take the measurements of an iteration played in `mode`, and decide on the mode of the next."""
        self.iteration += 1
        self.stay.append(measured.score)
        # On above the limit, off only clearly below it: a measure that trembles at its limit changes nothing.
        self.dominated = measured.lead > (-_OVERLAP if self.dominated else 0.0)
        self.alike = measured.agreement >= self.rules.agreement - (self.rules.relief if self.alike else 0.0)
        after, trigger, reason = self._decide(measured)
        decision = SwitchDecision(self.iteration, self.mode, after, trigger, reason)
        if decision.switched:
            self.left_at[self.mode] = self.iteration
            if (progress := self._slope()) is not None:
                self.slopes[self.mode] = progress
            self.mode, self.stay = after, []
        return decision

    def _decide(self, measured: Measurement) -> tuple[str, Trigger, str]:
        rules, stayed = self.rules, len(self.stay)
        if self.iteration < rules.exploration:
            after = self.modes[self.iteration * len(self.modes) // rules.exploration]
            return after, "exploration", f"iteration {self.iteration} of {rules.exploration} of exploration: {after}"
        if stayed < rules.min_stay:
            return self.mode, "stay", f"{stayed} of at least {rules.min_stay} iterations in {self.mode}"
        allowed = self._allowed()
        if self.mode not in allowed:
            return self._cured(measured, allowed)
        return self._by_progress([mode for mode in allowed if mode != self.mode])

    def _allowed(self) -> list[str]:
        modes = list(self.modes)
        for holds, cures in ((self.dominated, _AGAINST_DOMINANCE), (self.alike, _AGAINST_SAMENESS)):
            # With modes of which none is a cure there is nothing to bar.
            if holds and (curing := [mode for mode in modes if mode in cures]):
                modes = curing
        return modes

    def _cured(self, measured: Measurement, allowed: Sequence[str]) -> tuple[str, Trigger, str]:
        after = self._most_promising(allowed)
        if self.dominated and self.mode not in _AGAINST_DOMINANCE:
            lead = f"{measured.leader} is rated surely above all others, by {measured.lead:.2f} points"
            return after, "dominance", f"{lead}; {after} instead of {self.mode}"
        limit = f"policies answer alike in {measured.agreement:.2f} of the problems (limit {self.rules.agreement:.2f})"
        return after, "diversity", f"{limit}; {after} instead of {self.mode}"

    def _by_progress(self, others: Sequence[str]) -> tuple[str, Trigger, str]:
        slope = self._slope()
        if slope is None or not others:
            return self.mode, "stay", f"{len(self.stay)} iterations in {self.mode}, {len(others)} other modes open"
        other = self._most_promising(others)
        then = self.slopes.get(other)
        seen = "was not measured yet" if then is None else f"had {then:+.4f}"
        slopes = f"{self.mode} moves the score by {slope:+.4f} an iteration; {other} {seen}"
        if then is not None and then > slope + self.rules.margin:
            return other, "progress", f"{slopes}, more by over {self.rules.margin:g}"
        if len(self.stay) >= self.rules.window and slope < self.rules.plateau:
            other = self._longest_left(others)
            return other, "plateau", f"{slopes}; below {self.rules.plateau:g} is a plateau, {other} rested longest"
        return self.mode, "stay", slopes

    def _most_promising(self, modes: Sequence[str]) -> str:
        """The greatest last slope; modes without one before all, then who rested longest."""
        rested = self._longest_left(modes)
        return max(modes, key=lambda mode: (self.slopes.get(mode, math.inf), mode == rested))

    def _longest_left(self, modes: Sequence[str]) -> str:
        return min(modes, key=lambda mode: (self.left_at.get(mode, -1), self.modes.index(mode)))

    def _slope(self) -> float | None:
        """Score per iteration over the last `window` of this stay; None with fewer than three."""
        scores = np.asarray(self.stay[-self.rules.window :], np.float64)
        if scores.size < 3:
            return None
        times = np.arange(scores.size) - (scores.size - 1) / 2
        return float(times @ scores / (times @ times))
