"""Competitive mode: every policy for itself; the worst-rated policy may be replaced, as `population.pbt` decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedmoe.arena.modes.credit import Credit, weighted_rule
from fedmoe.arena.modes.judging import add_advantages, credit_seats, make_examples, task_seeds, update_ratings
from fedmoe.arena.modes.memory import ModeMemory
from fedmoe.arena.modes.protocol import ArenaDecision, Judgement, Mode, ModeError, PlanInputs
from fedmoe.arena.population.pbt import choose_replacement
from fedmoe.arena.rollout.episodes import EpisodePlan, PlayedEpisode, Player
from fedmoe.arena.tasks.task import Lineup, Task

#: One's own result, and being ahead of the others.
WEIGHTS = Credit(individual=0.75, versus=0.25)
_RULE = weighted_rule(WEIGHTS)
#: The share of groups in which one frozen opponent sits at the table, so that rewards mean more than being better
#: than present company.
FROZEN_SHARE = 0.25


class CompetitiveMode(Mode):
    """Policies answer or play independently, against each other and against frozen opponents.

    Tasks for more seats than policies get all policies at one table, others get full tables of some (games for two:
    pairs). A policy is replaced after `min_games` rated games, and not within `cooldown` iterations of the last one.
    """

    name = "competitive"
    min_games = 60
    cooldown = 10

    def check(self, task: Task, policies: int) -> None:
        """Refuse fewer than two policies, or a task that does not seat them as rivals."""
        if policies < 2 or task.seats[1] < 2 or policies < task.seats[0]:
            raise ModeError(
                f"{self.name} mode needs 2 policies or more and a task that seats them as rivals; got {policies} and "
                f"{task.name}, which seats {task.seats[0]} to {task.seats[1]}"
            )

    def plan(self, memory: ModeMemory, planning: PlanInputs) -> list[EpisodePlan]:
        """All policies at one table where there is room for a guest, else full tables; in some groups that guest."""
        plans: list[EpisodePlan] = []
        for group, seed in enumerate(task_seeds(planning)):
            players = self._players(memory, planning, group)
            lineup = Lineup.alone(len(players))
            plans += [EpisodePlan(seed, lineup, players, group, sample) for sample in range(planning.samples)]
        return plans

    def _players(self, memory: ModeMemory, planning: PlanInputs, group: int) -> tuple[Player, ...]:
        rng, most = planning.rng, planning.task.seats[1]
        frozen = rng.random() < FROZEN_SHARE
        if most > len(planning.policies):
            chosen = [planning.policies[index] for index in rng.permutation(len(planning.policies))]
            return (*chosen, memory.opponents.sample(chosen[0].name, rng).player()) if frozen else tuple(chosen)
        # Everybody gets the same number of tables, whatever their rating.
        first = planning.policies[group % len(planning.policies)]
        others = [player for player in planning.policies if player.name != first.name]
        rivals = [others[index] for index in rng.permutation(len(others))[: most - 1]]
        if frozen:
            rivals[-1] = memory.opponents.sample(first.name, rng).player()
        seated = [first, *rivals]
        return tuple(seated[index] for index in rng.permutation(len(seated)))

    def judge(self, memory: ModeMemory, planning: PlanInputs, played: Sequence[PlayedEpisode]) -> Judgement:
        """Own result and lead over the rivals; ratings; perhaps a replacement."""
        results = add_advantages(memory, planning, played, credit_seats(_RULE, played))
        update_ratings(memory, played)
        _remember(memory, played)
        since = memory.lineage.since_last(planning.iteration)
        for name in planning.names:
            memory.ratings.ensure(name)
        judgement = Judgement(make_examples(played, results), tuple(results))
        chosen = choose_replacement(
            memory.ratings, planning.names, min_games=self.min_games, cooldown=self.cooldown, since_last=since
        )
        if chosen is None:
            return judgement
        decision = ArenaDecision("replace", chosen.worst, chosen.worst, f"changed copy of {chosen.best}", chosen.reason)
        return replace(judgement, decisions=(decision,), replacements=(chosen,))


def _remember(memory: ModeMemory, played: Sequence[PlayedEpisode]) -> None:
    """Enter results against frozen opponents, for choosing the next ones."""
    opponents = {opponent.label for opponent in memory.opponents.opponents}
    for episode in played:
        scores = dict(zip(episode.plan.players, episode.outcome.seat_scores, strict=True))
        for frozen in (player for player in scores if player.name in opponents):
            for player in (player for player in scores if player.learning):
                lead = scores[player] - scores[frozen]
                memory.opponents.record(player.name, frozen.name, 1.0 if lead > 0 else 0.0 if lead < 0 else 0.5)
