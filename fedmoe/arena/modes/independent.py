"""Independent mode: every policy learns alone, as if it had a run of its own (GRPO); the other modes' baseline."""

from __future__ import annotations

from collections.abc import Sequence

from fedmoe.arena.modes.credit import Credit, weighted_rule
from fedmoe.arena.modes.judging import add_advantages, credit_seats, make_examples, task_seeds
from fedmoe.arena.modes.memory import ModeMemory
from fedmoe.arena.modes.protocol import Judgement, Mode, ModeError, PlanInputs
from fedmoe.arena.rollout.episodes import EpisodePlan, PlayedEpisode
from fedmoe.arena.tasks.task import Lineup, Task

#: One's own result and nothing else: GRPO (Shao et al. 2024, 2402.03300).
WEIGHTS = Credit(individual=1.0)
_RULE = weighted_rule(WEIGHTS)


class IndependentMode(Mode):
    """One policy at a table, `groups` problems of its own and `samples` answers to each; no ratings, no team."""

    name = "independent"

    def check(self, task: Task, policies: int) -> None:
        """Refuse a task that one seat cannot play alone."""
        if task.seats[0] > 1:
            raise ModeError(
                f"{self.name} mode needs a task for one seat; got {policies} policies and {task.name}, which needs "
                f"{task.seats[0]} seats; take competitive mode"
            )

    def plan(self, memory: ModeMemory, planning: PlanInputs) -> list[EpisodePlan]:
        """Groups of one policy each; no two policies share one."""
        lineup, samples = Lineup.alone(1), range(planning.samples)
        tables = [(player, seed) for player in planning.policies for seed in task_seeds(planning)]
        return [
            EpisodePlan(seed, lineup, (player,), group, sample)
            for group, (player, seed) in enumerate(tables)
            for sample in samples
        ]

    def judge(self, memory: ModeMemory, planning: PlanInputs, played: Sequence[PlayedEpisode]) -> Judgement:
        """Own result, compared within the group."""
        results = add_advantages(memory, planning, played, credit_seats(_RULE, played, WEIGHTS.individual))
        return Judgement(make_examples(played, results), tuple(results))
