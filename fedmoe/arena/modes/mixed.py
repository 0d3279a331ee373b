"""Mixed mode: cooperative, competitive or team battle, switched by measured learning progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

from fedmoe.arena.modes.competitive import CompetitiveMode
from fedmoe.arena.modes.cooperative import CooperativeMode
from fedmoe.arena.modes.memory import ModeMemory
from fedmoe.arena.modes.protocol import ArenaDecision, Judgement, Mode, PlanInputs
from fedmoe.arena.modes.switching import Measurement, ModeSwitch, SwitchRules, agreement
from fedmoe.arena.modes.team_battle import TeamBattleMode
from fedmoe.arena.rollout.episodes import EpisodePlan, PlayedEpisode
from fedmoe.arena.tasks.task import Task
from fedmoe.runtime.saved_state import restored, saved_state

#: Short stays: a run of a dozen iterations already visits all three parts.
RULES = SwitchRules(exploration=9, min_stay=4, window=6)


class MixedMode(Mode):
    """Plays one of its parts, chooses the next after every iteration, and resets the baselines on a switch.

    Every problem of training is drawn fresh, so the mean score on it measures progress without bias.
    """

    name = "mixed"

    def __init__(self, rules: SwitchRules = RULES) -> None:
        parts: tuple[Mode, ...] = (CooperativeMode(), CompetitiveMode(), TeamBattleMode())
        self._parts = {part.name: part for part in parts}
        self._switch = ModeSwitch(tuple(self._parts), rules)

    @property
    def playing(self) -> str:
        """The part being played."""
        return self._switch.mode

    def check(self, task: Task, policies: int) -> None:
        """What all parts need."""
        for part in self._parts.values():
            part.check(task, policies)

    def plan(self, memory: ModeMemory, planning: PlanInputs) -> list[EpisodePlan]:
        """The present part's plan."""
        return self._parts[self.playing].plan(memory, planning)

    def judge(self, memory: ModeMemory, planning: PlanInputs, played: Sequence[PlayedEpisode]) -> Judgement:
        """The present part's judgement, and which part is next."""
        judged = self._parts[self.playing].judge(memory, planning, played)
        switch = self._switch.step(_measured(memory, planning, played))
        if not switch.switched:
            return judged
        reason = f"{switch.trigger}: {switch.reason}; {memory.baselines.reset()} baselines begin anew"
        decision = ArenaDecision("mode", "", switch.before, switch.after, reason)
        return replace(judged, decisions=(*judged.decisions, decision))

    def state(self) -> dict[str, object]:
        """The switch."""
        return {"switch": saved_state(self._switch)}

    def restore(self, state: Mapping[str, object]) -> None:
        """Take over the switch."""
        self._switch = restored(ModeSwitch, cast("Mapping[str, object]", state["switch"]))


def _measured(memory: ModeMemory, planning: PlanInputs, played: Sequence[PlayedEpisode]) -> Measurement:
    scores = [
        score
        for episode in played
        for player, score in zip(episode.plan.players, episode.outcome.seat_scores, strict=True)
        if player.learning
    ]
    for name in planning.names:
        memory.ratings.ensure(name)
    leader, lead = memory.ratings.leader(planning.names)
    answered = [answers for episode in played if len(answers := _answers(episode)) > 1]
    return Measurement(sum(scores) / len(scores), leader, lead, agreement(answered) if answered else 0.0)


def _answers(episode: PlayedEpisode) -> list[str]:
    """The last words of every learning seat."""
    last = {turn.seat: turn.text.strip() for turn in episode.turns if turn.player.learning}
    return [last[seat] for seat in sorted(last)]
