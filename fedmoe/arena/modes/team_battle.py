"""Team battle mode: two balanced teams, zero-sum between them; each chooses its strategy by a bandit."""

from __future__ import annotations

from collections.abc import Sequence

from fedmoe.arena.modes.credit import Credit, weighted_rule
from fedmoe.arena.modes.judging import add_advantages, credit_seats, make_examples, task_seeds, update_ratings
from fedmoe.arena.modes.memory import ModeMemory
from fedmoe.arena.modes.protocol import ArenaDecision, Judgement, Mode, ModeError, PlanInputs
from fedmoe.arena.modes.strategy import StrategyDraw, team_options
from fedmoe.arena.modes.teams import balanced_teams
from fedmoe.arena.rollout.episodes import EpisodePlan, PlayedEpisode
from fedmoe.arena.tasks.task import Lineup, Task

#: Being ahead of the other team, what the team would miss without the seat, and the seat's own answer.
WEIGHTS = Credit(individual=1.0, difference=1.0, versus=0.25)
_RULE = weighted_rule(WEIGHTS)
TEAMS = 2


class TeamBattleMode(Mode):
    """Policies are divided into two teams of about equal rating, anew for every group.

    Each team chooses how it works (which drafts are shared, who speaks first) by a bandit made for opponents that
    adapt; the choice, its probability and what it earned are what the team learns from.
    """

    name = "team_battle"

    def __init__(self) -> None:
        self._choices: dict[tuple[int, int], tuple[str, StrategyDraw]] = {}

    def check(self, task: Task, policies: int) -> None:
        """Refuse an odd number of policies, fewer than four, or a task that does not seat them in teams."""
        if task.zero_sum or policies < 2 * TEAMS or policies % TEAMS or policies > task.seats[1]:
            raise ModeError(
                f"{self.name} mode needs an even number of policies from {2 * TEAMS} on and a task that seats them in "
                f"two teams; got {policies} and {task.name} ({task.seats[0]} to {task.seats[1]} seats); "
                "take committee:<data set>"
            )

    def plan(self, memory: ModeMemory, planning: PlanInputs) -> list[EpisodePlan]:
        """Two balanced teams a group, each with a strategy of its own choice."""
        self._choices = {}
        for name in planning.names:
            memory.ratings.ensure(name)
        strength = {name: memory.ratings[name].mu for name in planning.names}
        plans: list[EpisodePlan] = []
        for group, seed in enumerate(task_seeds(planning)):
            split = balanced_teams(strength, TEAMS, planning.rng)
            names = [name for team in split for name in team]
            teams, start = [], 0
            for index, members in enumerate(split):
                seats = range(start, start + len(members))
                options = team_options(planning.task.strategies, members, seats)
                key = "+".join(sorted(members))
                choice = memory.strategies.choose(key, list(options), planning.rng)
                self._choices[(group, index)] = (key, choice)
                teams.append(options[choice.option])
                start += len(members)
            players = tuple(planning.player(name) for name in names)
            lineup = Lineup(tuple(teams))
            plans += [EpisodePlan(seed, lineup, players, group, sample) for sample in range(planning.samples)]
        return plans

    def judge(self, memory: ModeMemory, planning: PlanInputs, played: Sequence[PlayedEpisode]) -> Judgement:
        """Lead over the other team plus difference reward; ratings of teams; what each choice was worth."""
        results = add_advantages(memory, planning, played, credit_seats(_RULE, played, WEIGHTS.individual))
        update_ratings(memory, played)
        return Judgement(make_examples(played, results), tuple(results), self._learn(memory, played))

    def _learn(self, memory: ModeMemory, played: Sequence[PlayedEpisode]) -> tuple[ArenaDecision, ...]:
        decisions = []
        for (group, index), (key, choice) in self._choices.items():
            scores = [episode.outcome.team_scores for episode in played if episode.plan.group == group]
            if not scores:  # every episode of the group failed: the choice has earned nothing yet
                continue
            leads = [own[index] - own[1 - index] for own in scores]
            # Zero-sum in [0, 1]: 0.5 is level.
            reward = 0.5 + 0.5 * sum(leads) / len(leads)
            memory.strategies.learn(key, choice, reward)
            reason = f"drawn with probability {choice.probability:.2f}; share of points {reward:.2f} in {len(leads)}"
            decisions.append(ArenaDecision("strategy", key, "", choice.option, reason))
        return tuple(decisions)
