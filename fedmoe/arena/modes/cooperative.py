"""Cooperative mode: all policies in one team, rewarded for the joint score and for what each adds to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedmoe.arena.modes.allocation import allocate
from fedmoe.arena.modes.credit import Credit, weighted_rule
from fedmoe.arena.modes.judging import add_advantages, credit_seats, make_examples, mean_rewards_by_group, task_seeds
from fedmoe.arena.modes.memory import ModeMemory
from fedmoe.arena.modes.protocol import ArenaDecision, Judgement, Mode, ModeError, PlanInputs
from fedmoe.arena.rollout.episodes import EpisodePlan, PlayedEpisode
from fedmoe.arena.tasks.task import Lineup, Task, Team

#: A little of the common reward, what the team would miss without the seat, and the seat's own answer. The difference
#: already has the common reward's gradient for a final answer, without the others' luck (Wolpert & Tumer 2002); the
#: common reward itself is what makes a draft that helps others worth something.
WEIGHTS = Credit(individual=1.0, shared=0.25, difference=1.0)
_RULE = weighted_rule(WEIGHTS)


class CooperativeMode(Mode):
    """All policies are one team; the seats' order changes from group to group.

    Rollout budget moves to the ways of working together (the task's strategies) in which the rewards of a group still
    differ: where they do not, there is nothing to learn.
    """

    name = "cooperative"

    def __init__(self) -> None:
        self._strategy_of: dict[int, str] = {}
        self._spent: dict[str, int] = {}

    def check(self, task: Task, policies: int) -> None:
        """Refuse fewer than two policies, or a task that does not seat them all in one team."""
        if task.zero_sum or not task.seats[0] <= policies <= task.seats[1] or policies < 2:
            raise ModeError(
                f"{self.name} mode needs a task with room for one team of {policies} (2 or more), {task.name} seats "
                f"{task.seats[0]} to {task.seats[1]}{' rivals' if task.zero_sum else ''}; take committee:<data set>"
            )

    def plan(self, memory: ModeMemory, planning: PlanInputs) -> list[EpisodePlan]:
        """One line-up a group: all policies in one team, in a random speaking order."""
        self._spent = allocate(planning.groups, self._deviations(memory, planning))
        strategies = [name for name, count in self._spent.items() for _ in range(count)]
        plans: list[EpisodePlan] = []
        self._strategy_of = dict(enumerate(strategies))
        for group, (seed, strategy) in enumerate(zip(task_seeds(planning), strategies, strict=True)):
            order = planning.rng.permutation(len(planning.policies))
            seats = tuple(int(seat) for seat in planning.rng.permutation(len(planning.policies)))
            players = tuple(planning.policies[index] for index in order)
            lineup = Lineup((Team(seats, strategy),))
            plans += [EpisodePlan(seed, lineup, players, group, sample) for sample in range(planning.samples)]
        return plans

    def _deviations(self, memory: ModeMemory, planning: PlanInputs) -> dict[str, float]:
        """Of the task's strategies, as many as there are groups."""
        return memory.signal.deviations((planning.task.strategies or ("",))[: planning.groups])

    def judge(self, memory: ModeMemory, planning: PlanInputs, played: Sequence[PlayedEpisode]) -> Judgement:
        """Shared plus difference reward, compared within the group of one policy."""
        results = add_advantages(memory, planning, played, credit_seats(_RULE, played, WEIGHTS.individual))
        for strategy, rewards in mean_rewards_by_group(played, results, self._strategy_of):
            if len(rewards) > 1:
                memory.signal.observe(strategy, rewards)
        return Judgement(make_examples(played, results), tuple(results), self._moved(memory, planning))

    def _moved(self, memory: ModeMemory, planning: PlanInputs) -> tuple[ArenaDecision, ...]:
        deviations = self._deviations(memory, planning)
        after = allocate(planning.groups, deviations)
        if after == self._spent or len(deviations) < 2:
            return ()
        why = ", ".join(f"{name} {value:.3f}" for name, value in deviations.items())
        return (
            ArenaDecision("budget", "", _shown(self._spent), _shown(after), f"reward deviation within groups: {why}"),
        )


def _shown(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name or 'plain'} {count}" for name, count in counts.items())
