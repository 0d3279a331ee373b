"""Modes (E2, E3, E4, E5) on episodes made by hand: who sits where, what it earns, and what is decided."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint, EntryPoints

import numpy as np
import pytest
from letters import LettersTask, planned, played

from fedmoe.arena.modes import competitive, cooperative, team_battle
from fedmoe.arena.modes.advantages import BaselineKey
from fedmoe.arena.modes.competitive import CompetitiveMode
from fedmoe.arena.modes.cooperative import CooperativeMode
from fedmoe.arena.modes.credit import Credit
from fedmoe.arena.modes.memory import ModeMemory
from fedmoe.arena.modes.mixed import MixedMode
from fedmoe.arena.modes.protocol import ArenaDecision, Judgement, Mode, ModeError, PlanInputs
from fedmoe.arena.modes.registry import MODES, make_mode
from fedmoe.arena.modes.switching import SwitchRules
from fedmoe.arena.modes.team_battle import TeamBattleMode
from fedmoe.arena.population.pbt import SURELY, Birth
from fedmoe.arena.rollout.episodes import EpisodePlan, PlayedEpisode, Player
from fedmoe.arena.tasks.task import HELD_OUT, check_lineup
from fedmoe.inference.engine import AdapterKey
from fedmoe.runtime import plugins
from fedmoe.runtime.saved_state import restored, saved_state

NAMES = ("ann", "bob", "cy", "dee")
TASK = LettersTask()
DUEL = LettersTask((2, 2), zero_sum=True, strategies=(), name="test:duel")
Score = Callable[[Player, int], float]


def make_planning(
    iteration: int = 0, task: LettersTask = TASK, names: Sequence[str] = NAMES, **sizes: int
) -> PlanInputs:
    return planned(names, task, iteration, **sizes)


def copied(society: ModeMemory) -> ModeMemory:
    """The same through JSON, as a checkpoint keeps it."""
    return restored(ModeMemory, json.loads(json.dumps(saved_state(society))))


def by_name(scores: Mapping[str, float]) -> Score:
    return lambda player, sample: scores.get(player.name, 0.0)


VARIED = {"ann": (0.1, 0.5, 0.2), "bob": (0.7, 0.3, 0.0), "cy": (0.2, 0.25, 0.9), "dee": (0.6, 0.05, 0.35)}


def varied(player: Player, sample: int) -> float:
    """Every policy does better in some samples than in others."""
    return VARIED.get(player.name, (0.4, 0.4, 0.4))[sample % 3]


def judged(
    mode: Mode, society: ModeMemory, planning: PlanInputs, score: Score, valid: float = 1.0
) -> tuple[list[PlayedEpisode], Judgement]:
    episodes = [played(plan, score, valid) for plan in mode.plan(society, planning)]
    return episodes, mode.judge(society, planning, episodes)


def groups_of(plans: Sequence[EpisodePlan]) -> dict[int, list[EpisodePlan]]:
    found: dict[int, list[EpisodePlan]] = {}
    for plan in plans:
        found.setdefault(plan.group, []).append(plan)
    return found


@pytest.mark.parametrize(
    ("mode", "task", "policies"),
    [
        ("cooperative", LettersTask(), 1),
        ("cooperative", LettersTask((1, 3)), 4),
        ("cooperative", LettersTask((5, 8)), 4),
        ("cooperative", DUEL, 2),
        ("competitive", LettersTask(), 1),
        ("competitive", LettersTask((1, 1)), 4),
        ("competitive", LettersTask((6, 8)), 4),
        ("team_battle", LettersTask(), 2),
        ("team_battle", LettersTask(), 5),
        ("team_battle", LettersTask((1, 3)), 4),
        ("team_battle", DUEL, 4),
        ("mixed", LettersTask(), 5),
        ("mixed", DUEL, 4),
        ("independent", DUEL, 4),
    ],
)
def test_a_mode_refuses_what_it_cannot_be_played_with_and_says_what_it_got(
    mode: str, task: LettersTask, policies: int
) -> None:
    with pytest.raises(ModeError, match=rf"{policies} (.*){task.name}|{task.name}(.*){policies}|of {policies} "):
        make_mode(mode).check(task, policies)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_four_policies_on_a_task_with_room_can_play_every_mode(mode: str) -> None:
    made = make_mode(mode)
    made.check(TASK, 4)
    assert made.name == mode


@pytest.mark.parametrize("mode", sorted(MODES.keys() - {"independent"}))
def test_groups_share_problem_and_line_up_and_every_policy_sits_once(mode: str) -> None:
    made, planning = make_mode(mode), make_planning(groups=12, samples=3)
    groups = groups_of(made.plan(ModeMemory(), planning))
    assert sorted(groups) == list(range(12))
    assert len({plans[0].seed for plans in groups.values()}) == 12
    for plans in groups.values():
        assert [plan.sample for plan in plans] == [0, 1, 2]
        assert len({(plan.seed, plan.lineup, plan.players) for plan in plans}) == 1
        (plan, *_) = plans
        assert 0 <= plan.seed < HELD_OUT
        check_lineup(TASK, plan.lineup)
        assert len(plan.players) == plan.lineup.seats
        assert sorted(player.name for player in plan.players if player.learning) == sorted(NAMES)
        assert all(player.key == AdapterKey(player.name, 0) for player in plan.players if player.learning)


def test_independent_policies_share_neither_table_nor_problem_and_earn_what_they_achieve() -> None:
    mode, planning = make_mode("independent"), make_planning(groups=3, samples=2)
    groups = groups_of(mode.plan(ModeMemory(), planning))
    assert Counter(plans[0].players[0].name for plans in groups.values()) == dict.fromkeys(NAMES, 3)
    assert len({plans[0].seed for plans in groups.values()}) == 12, "everybody has problems of its own"
    for plans in groups.values():
        assert [(plan.sample, plan.lineup.seats) for plan in plans] == [(0, 1), (1, 1)]
        assert len({(plan.seed, plan.players) for plan in plans}) == 1
    society = ModeMemory()
    episodes, found = judged(mode, society, planning, varied)
    for result in found.results:
        assert result.credit.reward == episodes[result.episode].outcome.seat_scores[0]
    assert society.ratings.players == {}, "nobody met anybody"
    make_mode("independent").check(TASK, 1)


def test_cooperation_is_one_team_of_all_with_changing_order_and_strategy() -> None:
    plans = CooperativeMode().plan(ModeMemory(), make_planning(groups=12))
    assert all(len(plan.lineup.teams) == 1 for plan in plans)
    assert len({plan.lineup.teams[0].seats for plan in plans}) > 2
    assert len({plan.players for plan in plans}) > 2
    assert {plan.lineup.teams[0].strategy for plan in plans} == set(TASK.strategies)


def test_competition_is_everybody_for_himself_with_a_frozen_guest_in_a_quarter_of_the_groups() -> None:
    plans = CompetitiveMode().plan(ModeMemory(), make_planning(groups=400, samples=2))
    guests = [[player for player in plan.players if not player.learning] for plan in plans]
    assert {len(plan.lineup.teams) for plan in plans} == {4, 5}
    assert all(len(team.seats) == 1 for plan in plans for team in plan.lineup.teams)
    assert all(len(found) <= 1 for found in guests)
    assert 0.15 < sum(map(len, guests)) / len(plans) < 0.35
    assert {player.name for found in guests for player in found} == {"base", "random"}


def test_where_not_all_fit_everybody_gets_as_many_tables_and_both_seats() -> None:
    plans = CompetitiveMode().plan(ModeMemory(), make_planning(task=DUEL, groups=80, samples=2))
    assert {plan.lineup.seats for plan in plans} == {2}
    firsts = Counter(name for plan in plans for name in {player.name for player in plan.players if player.learning})
    assert min(firsts[name] for name in NAMES) >= 2 * 80 / len(NAMES)
    seats = {(player.name, seat) for plan in plans for seat, player in enumerate(plan.players) if player.learning}
    assert seats == {(name, seat) for name in NAMES for seat in (0, 1)}


@pytest.mark.parametrize("seats", [(3, 3), (2, 3), (4, 4), (3, 4)])
def test_a_table_that_policies_just_fill_is_full_with_a_frozen_guest_too(seats: tuple[int, int]) -> None:
    task = LettersTask(seats)
    CompetitiveMode().check(task, 4)
    plans = CompetitiveMode().plan(ModeMemory(), make_planning(task=task, groups=60, samples=1))
    assert {plan.lineup.seats for plan in plans} == {seats[1]}
    assert {sum(player.learning for player in plan.players) for plan in plans} == {seats[1], seats[1] - 1}
    assert all(len(set(plan.players)) == len(plan.players) for plan in plans)


def test_a_battle_is_two_equal_teams_of_about_equal_rating_that_choose_their_way() -> None:
    society, mode = ModeMemory(), TeamBattleMode()
    for name in NAMES:
        society.ratings.ensure(name)
    for _ in range(30):  # ann and bob become much stronger than cy and dee
        society.ratings.rate([["ann"], ["cy"]], [1, 0])
        society.ratings.rate([["bob"], ["dee"]], [1, 0])
    plans = mode.plan(society, make_planning(groups=30))
    for plan in plans:
        teams = [{plan.players[seat].name for seat in team.seats} for team in plan.lineup.teams]
        assert [len(team) for team in teams] == [2, 2]
        assert {"ann", "bob"} not in teams, "the two strongest are never one team"
        assert all(team.strategy in TASK.strategies for team in plan.lineup.teams)
    assert len({plan.lineup.teams[0].strategy for plan in plans}) == 2


@pytest.mark.parametrize(("mode", "task"), [*((mode, TASK) for mode in sorted(MODES)), ("competitive", DUEL)])
def test_planning_again_gives_the_same_plan_whether_or_not_the_society_saw_the_first(
    mode: str, task: LettersTask
) -> None:
    made, society = make_mode(mode), ModeMemory()
    for iteration in range(3):
        judged(made, society, make_planning(iteration, task), varied)
    before = copied(society)
    first = made.plan(society, make_planning(3, task))
    assert made.plan(society, make_planning(3, task)) == first, "planned again on what the first planning left"
    resumed = make_mode(mode)
    resumed.restore(json.loads(json.dumps(made.state())))
    assert resumed.plan(before, make_planning(3, task)) == first, "planned in another process from a checkpoint"
    assert made.plan(society, make_planning(4, task)) != first


def weighed(weights: Credit, parts: Credit) -> float:
    """The reward that a mode's weights make of the parts; None counts nothing where it has no weight."""
    pairs = zip(weights.parts().values(), parts.parts().values(), strict=True)
    return sum(weight * (part or 0.0) for weight, part in pairs if weight)


def test_cooperation_pays_the_common_result_ones_own_and_what_the_team_would_miss() -> None:
    scores = {"ann": 0.8, "bob": 0.5, "cy": 0.2, "dee": 0.0}
    _, found = judged(CooperativeMode(), ModeMemory(), make_planning(), by_name(scores))
    assert all(cooperative.WEIGHTS.parts()[name] for name in ("individual", "shared", "difference"))
    for result in found.results:
        # Without ann the team has 0.5, without any other still 0.8.
        parts = Credit(scores[result.policy], 0.8, 0.3 if result.policy == "ann" else 0.0, None)
        assert result.credit.parts.parts() == pytest.approx(parts.parts())
        assert result.credit.reward == pytest.approx(weighed(cooperative.WEIGHTS, parts))


def test_competition_pays_ones_own_result_and_the_lead_over_the_rivals() -> None:
    scores = {"ann": 0.9, "bob": 0.6, "cy": 0.3, "dee": 0.0}
    ahead = {"ann": 0.6, "bob": 0.2, "cy": -0.2, "dee": -0.6}
    plans = [plan for plan in CompetitiveMode().plan(ModeMemory(), make_planning(groups=8)) if plan.lineup.seats == 4]
    found = CompetitiveMode().judge(ModeMemory(), make_planning(), [played(plan, by_name(scores)) for plan in plans])
    assert all(competitive.WEIGHTS.parts()[name] for name in ("individual", "versus"))
    for result in found.results:
        parts = Credit(scores[result.policy], scores[result.policy], None, ahead[result.policy])
        assert result.credit.parts.parts() == pytest.approx(parts.parts())
        assert result.credit.reward == pytest.approx(weighed(competitive.WEIGHTS, parts))


def test_a_battle_is_zero_sum_between_teams_and_pays_what_each_member_adds() -> None:
    scores = {"ann": 0.8, "bob": 0.5, "cy": 0.2, "dee": 0.0}
    episodes, found = judged(TeamBattleMode(), ModeMemory(), make_planning(groups=10), by_name(scores))
    assert all(team_battle.WEIGHTS.parts()[name] for name in ("difference", "versus"))
    for index, episode in enumerate(episodes):
        own = {result.seat: result.credit for result in found.results if result.episode == index}
        leads = [{own[seat].parts.versus for seat in team.seats} for team in episode.plan.lineup.teams]
        assert [len(lead) for lead in leads] == [1, 1]
        assert sum(lead or 0.0 for team in leads for lead in team) == pytest.approx(0.0)
        for seat, credit in own.items():
            assert credit.reward == pytest.approx(weighed(team_battle.WEIGHTS, credit.parts))
            assert credit.parts.individual == scores[episode.plan.players[seat].name]


@pytest.mark.parametrize("mode", sorted(MODES))
def test_advantages_compare_a_policy_with_itself_within_its_group(mode: str) -> None:
    episodes, found = judged(make_mode(mode), ModeMemory(), make_planning(groups=6), varied)
    sums: dict[tuple[int, str, int], list[float]] = {}
    for result in found.results:
        key = (episodes[result.episode].plan.group, result.policy, result.seat)
        sums.setdefault(key, []).append(result.advantage)
    assert len(sums) == 6 * len(NAMES)
    for advantages in sums.values():
        assert len(advantages) == 3
        assert sum(advantages) == pytest.approx(0.0, abs=1e-9)
        assert max(advantages) > 0.05
    assert found.examples


@pytest.mark.parametrize("mode", sorted(MODES))
def test_every_turn_of_a_learning_seat_is_an_example_and_of_no_other(mode: str) -> None:
    episodes, found = judged(make_mode(mode), ModeMemory(), make_planning(groups=12, samples=2), varied)
    if mode == "competitive":
        assert any(not turn.player.learning for one in episodes for turn in one.turns), "the base model played too"
    expected = [result for result in found.results if abs(result.advantage) > 1e-9]
    assert len(found.examples) == len(expected)
    for example, result in zip(found.examples, expected, strict=True):
        assert example.policy == example.turn.player.name == result.policy
        assert example.turn.player.learning
        assert (example.advantage, example.reward) == (result.advantage, result.credit.reward)
        assert example.turn in episodes[result.episode].turns


@pytest.mark.parametrize("mode", sorted(MODES))
def test_where_nothing_differs_there_is_nothing_to_learn_from(mode: str) -> None:
    _, found = judged(make_mode(mode), ModeMemory(), make_planning(), lambda player, sample: 0.5)
    assert found.examples == ()
    assert len(found.results) == 4 * 3 * len(NAMES)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_an_action_that_cannot_be_used_costs_a_half(mode: str) -> None:
    _, good = judged(make_mode(mode), ModeMemory(), make_planning(), varied)
    _, bad = judged(make_mode(mode), ModeMemory(), make_planning(), varied, valid=0.0)
    for one, other in zip(good.results, bad.results, strict=True):
        assert other.credit.reward == pytest.approx(one.credit.reward - 0.5)
        assert other.credit.parts == one.credit.parts


@pytest.mark.parametrize("mode", sorted(MODES))
def test_an_action_that_the_limit_cut_costs_a_half_of_its_share(mode: str) -> None:
    def cut(plan: EpisodePlan) -> PlayedEpisode:
        one = played(plan, varied)
        return replace(one, turns=tuple(replace(turn, stopped=ended) for turn in one.turns for ended in (True, False)))

    found = []
    for play in (lambda plan: played(plan, varied), cut):
        chosen, society, planning = make_mode(mode), ModeMemory(), make_planning()
        found.append(chosen.judge(society, planning, [play(plan) for plan in chosen.plan(society, planning)]).results)
    for one, other in zip(*found, strict=True):
        assert other.credit.reward == pytest.approx(one.credit.reward - 0.25)
        assert other.credit.parts == one.credit.parts


def test_a_draft_that_the_limit_cut_costs_the_draft_and_not_the_answer() -> None:
    mode, society, planning = CooperativeMode(), ModeMemory(), make_planning()
    episodes = []
    for plan in mode.plan(society, planning):
        one = played(plan, lambda player, sample: 0.0)
        drafts = dict.fromkeys(range(len(NAMES)), (0.0, 0.0))
        turns = tuple(replace(turn, stopped=ended) for turn in one.turns for ended in (False, True))
        episodes.append(replace(one, turns=turns, outcome=replace(one.outcome, turn_scores=drafts)))
    for result in mode.judge(society, planning, episodes).results:
        draft, answer = result.turn_rewards
        assert draft == pytest.approx(answer - 0.5)


def test_in_a_game_the_baseline_is_a_moving_average_of_policy_and_seat() -> None:
    society, mode = ModeMemory(), CompetitiveMode()
    planning = make_planning(task=DUEL, groups=8, samples=2)
    plans = mode.plan(society, planning)
    episodes = [played(plan, lambda player, sample: 1.0 if player.name == "ann" else 0.0) for plan in plans]
    found = mode.judge(society, planning, episodes)
    for result in found.results:
        assert result.advantage == pytest.approx(result.credit.reward), "nothing was known, so the average was 0"
    rewards = [result.credit.reward for result in found.results if (result.policy, result.seat) == ("ann", 0)]
    key = BaselineKey(DUEL.name, "seat 0", "ann")
    kept = 0.95 ** len(rewards)
    assert society.baselines.value(key) == pytest.approx((1 - kept) * float(np.mean(rewards)))
    before = society.baselines.value(key)
    again = mode.judge(society, planning, episodes)
    seen = [result for result in again.results if (result.policy, result.seat) == ("ann", 0)]
    assert seen
    for result in seen:
        assert result.advantage == pytest.approx(result.credit.reward - before)


def test_games_between_teams_are_rated_and_cooperation_is_not() -> None:
    scores = by_name({"ann": 0.9, "bob": 0.6, "cy": 0.3, "dee": 0.0})
    for mode in (CompetitiveMode(), TeamBattleMode()):
        society = ModeMemory()
        for iteration in range(6):
            judged(mode, society, make_planning(iteration), scores)
        order = sorted(NAMES, key=lambda name: -society.ratings[name].mu)
        assert order == list(NAMES), mode.name
        assert all(society.ratings[name].games == 6 * 12 for name in NAMES)
    society = ModeMemory()
    judged(CooperativeMode(), society, make_planning(), scores)
    assert not any(name in society.ratings for name in NAMES)


def test_results_against_frozen_opponents_choose_the_next_ones() -> None:
    society, mode = ModeMemory(), CompetitiveMode()
    society.opponents.add_champion(AdapterKey("ann", 7), 30.0)
    strong = by_name(dict.fromkeys(NAMES, 0.5) | {"ann@7": 1.0})
    for iteration in range(6):
        judged(mode, society, make_planning(iteration, groups=24), strong)
    pool = society.opponents
    assert pool.win_rate("bob", "ann@7") < 0.2 < 0.8 < pool.win_rate("bob", "base")
    chances = pool.probabilities("bob")
    assert chances["ann@7"] > 3 * max(chances["base"], chances["random"])


def test_a_team_learns_which_way_of_working_wins() -> None:
    society, mode = ModeMemory(), TeamBattleMode()

    def score(plan: EpisodePlan) -> Score:
        ways = {plan.players[seat].name: team.strategy for team in plan.lineup.teams for seat in team.seats}
        return lambda player, sample: 1.0 if ways[player.name] == "aloud" else 0.2

    for iteration in range(25):
        planning = make_planning(iteration, groups=8, samples=2)
        plans = mode.plan(society, planning)
        found = mode.judge(society, planning, [played(plan, score(plan)) for plan in plans])
    assert len(found.decisions) == 2 * 8
    for decision in found.decisions:
        assert decision.what == "strategy"
        assert set(decision.policy.split("+")) <= set(NAMES)
        assert "drawn with probability 0." in decision.reason
    aloud = []
    for decision in found.decisions:
        members = decision.policy.split("+")
        options = [f"{way}, {one} first" for way in TASK.strategies for one in members]
        chances = society.strategies.probabilities(decision.policy, options)
        aloud.append(sum(chance for option, chance in chances.items() if option.startswith("aloud")))
    assert float(np.mean(aloud)) > 0.6


def test_cooperation_moves_episodes_to_the_ways_in_which_rewards_still_differ() -> None:
    society, mode = ModeMemory(), CooperativeMode()
    counts: list[Counter[str]] = []
    decisions: list[ArenaDecision] = []
    for iteration in range(8):
        planning = make_planning(iteration, groups=8)
        plans = mode.plan(society, planning)
        counts.append(Counter(plan.lineup.teams[0].strategy for plan in plans if plan.sample == 0))
        episodes = [
            played(plan, varied if plan.lineup.teams[0].strategy == "aloud" else by_name({"ann": 1.0}))
            for plan in plans
        ]
        decisions += mode.judge(society, planning, episodes).decisions
    assert counts[0] == {"aloud": 4, "silently": 4}
    assert counts[-1]["aloud"] > 4
    assert counts[-1]["silently"] >= 1, "every way is still tried"
    assert (decisions[0].what, decisions[0].before) == ("budget", "aloud 4, silently 4")
    assert "reward deviation within groups: aloud 0." in decisions[0].reason


def test_fewer_groups_than_ways_of_working_still_make_a_plan() -> None:
    society, mode = ModeMemory(), CooperativeMode()
    _, found = judged(mode, society, make_planning(groups=1), varied)
    assert found.examples
    assert found.decisions == ()


class Eager(CompetitiveMode):
    """Replaces policies earlier."""

    def __init__(self, min_games: int, cooldown: int) -> None:
        self.min_games, self.cooldown = min_games, cooldown


def test_the_worst_is_replaced_only_once_the_intervals_are_surely_apart() -> None:
    society, mode = ModeMemory(), Eager(20, 5)
    scores = by_name({"ann": 0.9, "bob": 0.6, "cy": 0.5, "dee": 0.0})
    for iteration in range(40):
        _, found = judged(mode, society, make_planning(iteration, groups=1, samples=2), scores)
        apart = society.ratings.separated("ann", "dee", SURELY)
        enough = all(society.ratings[name].games >= 20 for name in ("ann", "dee"))
        assert bool(found.replacements) == (apart and enough)
        if found.replacements:
            break
    (wanted,) = found.replacements
    assert (wanted.best, wanted.worst) == ("ann", "dee")
    (decision,) = found.decisions
    assert (decision.what, decision.policy, decision.after) == ("replace", "dee", "changed copy of ann")
    assert "apart at 2.3 sigma" in decision.reason


def test_after_a_replacement_there_is_a_pause() -> None:
    society, mode = ModeMemory(), Eager(2, 5)
    scores = by_name({"ann": 0.9, "bob": 0.6, "cy": 0.5, "dee": 0.0})
    for iteration in range(15):
        judged(mode, society, make_planning(iteration), scores)
    society.lineage.add(Birth(AdapterKey("dee", 16), AdapterKey("ann", 15), 15, "made here", 0.0))
    replaced = [
        bool(judged(mode, society, make_planning(iteration), scores)[1].replacements) for iteration in range(16, 21)
    ]
    assert replaced == [False, False, False, False, True]


def test_equals_are_not_replaced() -> None:
    society, mode = ModeMemory(), Eager(2, 0)
    for iteration in range(25):
        _, found = judged(mode, society, make_planning(iteration), lambda player, sample: 0.5)
        assert found.replacements == ()


def test_mixed_mode_switches_with_a_reason_and_baselines_begin_anew() -> None:
    society, mode = ModeMemory(), MixedMode(SwitchRules(exploration=6, min_stay=2, window=3))
    seen, decisions = [], []
    for iteration in range(6):
        society.baselines.advantage(BaselineKey("t", "r", "ann"), [1.0])
        seen.append(mode.playing)
        _, found = judged(mode, society, make_planning(iteration), varied)
        switches = [decision for decision in found.decisions if decision.what == "mode"]
        decisions += switches
        remembered = society.baselines.baselines
        assert bool(remembered) != bool(switches)
    assert seen == ["cooperative"] * 2 + ["competitive"] * 2 + ["team_battle"] * 2
    assert [(one.before, one.after) for one in decisions] == list(
        zip(("cooperative", "competitive"), ("competitive", "team_battle"), strict=True)
    )
    assert all(one.reason.startswith("exploration: iteration ") for one in decisions)
    assert all(one.reason.endswith("; 1 baselines begin anew") for one in decisions)


def test_mixed_mode_leaves_a_mode_that_one_policy_dominates() -> None:
    society, mode = ModeMemory(), MixedMode(SwitchRules(exploration=3, min_stay=1, window=3))
    rng = np.random.default_rng(1)
    left = ""
    for iteration in range(30):
        competes = iteration > 3 and mode.playing == "competitive"

        def score(player: Player, sample: int, competes: bool = competes) -> float:
            return float(player.name == "ann") if competes else float(rng.random())

        _, found = judged(mode, society, make_planning(iteration, groups=12), score)
        left = next((one.reason for one in found.decisions if one.what == "mode" and competes), "")
        if left:
            break
    assert left.startswith("dominance: ann is rated surely above all others, by ")
    assert mode.playing in ("cooperative", "team_battle")


def test_mixed_mode_measures_agreement_on_tables_with_a_guest_too() -> None:
    society, mode = ModeMemory(), MixedMode(SwitchRules(exploration=3, min_stay=1, window=3))
    task = LettersTask((1, 4))
    mode.check(task, 4)
    for iteration in range(12):
        _, found = judged(mode, society, make_planning(iteration, task, groups=12), varied)
        assert found.results


@pytest.mark.parametrize("mode", sorted(MODES))
def test_a_mode_and_its_society_go_on_from_a_checkpoint_as_if_never_stopped(mode: str) -> None:
    first, society = make_mode(mode), ModeMemory()
    if mode == "mixed":
        first = MixedMode(SwitchRules(exploration=6, min_stay=2, window=3))
    for iteration in range(3):
        judged(first, society, make_planning(iteration), varied)
    state = json.loads(json.dumps(first.state()))
    second, later = make_mode(mode), copied(society)
    second.restore(state)
    assert saved_state(later) == saved_state(society)
    for iteration in range(3, 9):
        assert second.playing == first.playing
        one, other = (
            judged(made, found, make_planning(iteration), varied) for made, found in ((first, society), (second, later))
        )
        assert [episode.plan for episode in one[0]] == [episode.plan for episode in other[0]]
        assert _same(one[1], other[1])
    assert json.dumps(saved_state(later)) == json.dumps(saved_state(society))


def _same(one: Judgement, other: Judgement) -> bool:
    """Examples hold arrays, which do not compare as a whole."""
    alike = [(a.policy, a.advantage, a.turn.seat) for a in one.examples]
    return (
        alike == [(b.policy, b.advantage, b.turn.seat) for b in other.examples]
        and one.results == other.results
        and one.decisions == other.decisions
    )


class Quiet(CooperativeMode):
    """A mode of somebody else's."""

    name = "quiet"


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    found = EntryPoints(EntryPoint(name, f"{__name__}:Quiet", "fedmoe.modes") for name in names)
    monkeypatch.setattr(plugins, "entry_points", lambda **wanted: found.select(**wanted))


def test_a_plug_in_is_found_by_its_entry_point_e21(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "quiet")
    assert make_mode("quiet").name == "quiet"
    assert make_mode("mixed").name == "mixed"
    with pytest.raises(ModeError, match=r"'loud' is not known; there are: .*mixed, quiet, team_battle"):
        make_mode("loud")


@pytest.mark.parametrize("names", [("mixed",), ("quiet", "quiet")])
def test_two_modes_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    install(monkeypatch, *names)
    with pytest.raises(ModeError, match=rf"'{names[0]}' exists more than once \(also in .*Quiet"):
        make_mode(names[0])
