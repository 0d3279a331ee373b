"""Mixed mode: cooperative, competitive and team battle in turns, as measured learning progress says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedmoe.arena.modes.competitive import Competitive
from fedmoe.arena.modes.cooperative import Cooperative
from fedmoe.arena.modes.memory import ModeMemory
from fedmoe.arena.modes.protocol import ArenaDecision, Judgement, Mode, PlanInputs
from fedmoe.arena.modes.switching import Measurement, ModeSwitch, SwitchRules, agreement
from fedmoe.arena.modes.team_battle import TeamBattle
from fedmoe.arena.rollout.episodes import EpisodePlan, PlayedEpisode
from fedmoe.arena.tasks.task import Task

#: Short stays: a run of a dozen iterations already visits all three parts.
RULES = SwitchRules(exploration=9, min_stay=4, window=6)


class Mixed:
    """Plays one of its parts and decides after every iteration which is next; baselines begin anew on a switch.

    Every problem of training is drawn fresh, so the mean score on it measures progress without bias.
    """

    name = "mixed"

    def __init__(self, rules: SwitchRules = RULES) -> None:
        parts: tuple[Mode, ...] = (Cooperative(), Competitive(), TeamBattle())
        self._parts = {part.name: part for part in parts}
        self._switch = ModeSwitch(rules, tuple(self._parts))

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
        found = self._switch.step(_measured(memory, planning, played))
        if not found.switched:
            return judged
        forgotten = memory.baselines.reset(found.reason)
        reason = f"{found.trigger}: {found.reason}; {forgotten.forgotten} baselines begin anew"
        decision = ArenaDecision("mode", "", found.before, found.after, reason)
        return replace(judged, decisions=(*judged.decisions, decision))

    def state(self) -> dict[str, object]:
        """The switch."""
        return {"switch": self._switch.state()}

    def restore(self, state: Mapping[str, object]) -> None:
        """Take over the switch."""
        self._switch = ModeSwitch.from_state(state["switch"])  # type: ignore[arg-type]


def _measured(memory: ModeMemory, planning: PlanInputs, played: Sequence[PlayedEpisode]) -> Measurement:
    scores = [
        score
        for one in played
        for player, score in zip(one.plan.players, one.outcome.seat_scores, strict=True)
        if player.learning
    ]
    for name in planning.names:
        memory.ratings.ensure(name)
    leader, lead = memory.ratings.leader(planning.names)
    answered = [answers for one in played if len(answers := _answers(one)) > 1]
    return Measurement(sum(scores) / len(scores), leader, lead, agreement(answered) if answered else 0.0)


def _answers(episode: PlayedEpisode) -> list[str]:
    """The last words of every learning seat."""
    last = {turn.seat: turn.text.strip() for turn in episode.turns if turn.player.learning}
    return [last[seat] for seat in sorted(last)]
