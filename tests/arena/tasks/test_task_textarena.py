"""TextArena's games: illegal moves, repeatable dice, bounded observations, players of known strength."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from fedmoe.arena.tasks.task import Lineup, TaskError, Team
from fedmoe.arena.tasks.textarena_games import HISTORY_CHARS, MAX_ACTIONS, GameEpisode, TextArenaTask
from fedmoe.arena.tasks.textarena_rules import GAMES, tictactoe_value

TWO = Lineup.alone(2)
FORMATS = {
    "KuhnPoker-v0": "Reply with one of: [check] [bet]",
    "TicTacToe-v0": "Reply with one of: [0] [1] [2] [3] [4] [5] [6] [7] [8]",
    "PigDice-v0-short": "Reply with one of: [roll] [hold]",
    "IteratedMatchingPennies-v0": "Reply with one of: [heads] [tails]",
    "IteratedRockPaperScissors-v0": "Reply with one of: [rock] [paper] [scissors]",
    "IteratedPrisonersDilemma-v0": "Say one short sentence to the other player.",
}

Player = Callable[[GameEpisode, int, np.random.Generator], str]


def played(task: TextArenaTask, seed: int, players: tuple[Player, Player]) -> GameEpisode:
    episode, rng = task.start(seed, TWO), np.random.default_rng(seed)
    while wanted := episode.to_act():
        episode.act({seat: players[seat](episode, seat, rng) for seat in wanted})
    return episode


def mean_score(task: TextArenaTask, player: Player, other: Player, games: int) -> float:
    """The player's mean score, in both seats alternately."""
    scores = []
    for seed in range(games):
        seat = seed % 2
        players = (player, other) if seat == 0 else (other, player)
        scores.append(played(task, seed, players).outcome().seat_scores[seat])
    return float(np.mean(scores))


@pytest.mark.parametrize(("env_id", "reminder"), FORMATS.items())
def test_the_first_observation_has_the_rules_and_the_exact_format(env_id: str, reminder: str) -> None:
    episode = TextArenaTask(env_id).start(0, TWO)
    rules, turn = episode.observe(episode.to_act()[0])
    assert rules.role == "system"
    assert f"You are Player {episode.to_act()[0]}" in rules.text
    assert turn.text.endswith(f"Your turn. {reminder}")


@pytest.mark.parametrize("env_id", FORMATS)
def test_observations_stay_short_to_the_end(env_id: str) -> None:
    task = TextArenaTask(env_id)
    episode, rng = task.start(3, TWO), np.random.default_rng(3)
    while wanted := episode.to_act():
        assert len(episode.observe(wanted[0])[-1].text) < HISTORY_CHARS + 150
        episode.act({wanted[0]: task.random_action(episode, wanted[0], rng)})


@pytest.mark.parametrize("env_id", [env_id for env_id in FORMATS if "Dilemma" not in env_id])
def test_an_illegal_move_loses_at_once_and_is_counted_apart(env_id: str) -> None:
    task = TextArenaTask(env_id)
    episode, rng = task.start(1, TWO), np.random.default_rng(1)
    first = episode.to_act()[0]
    episode.act({first: task.random_action(episode, first, rng)})
    mover = episode.to_act()[0]
    episode.act({mover: "I do not know"})
    outcome = episode.outcome()
    assert episode.to_act() == ()
    assert outcome.seat_scores[mover] == 0.0
    assert outcome.seat_scores[1 - mover] == 1.0
    assert outcome.valid[mover] < 1.0
    assert outcome.valid[1 - mover] == 1.0
    assert not outcome.completed


def test_an_occupied_cell_and_a_number_of_thousands_of_digits_are_illegal() -> None:
    for text in ("[4]", "9" * 5000):
        episode = TextArenaTask("TicTacToe-v0").start(0, TWO)
        episode.act({0: "[4]"})
        episode.act({1: text})
        assert episode.outcome().seat_scores == (1.0, 0.0)
        assert episode.outcome().valid == (1.0, 0.0)


def test_a_decision_that_cannot_be_read_is_cooperation_and_counted() -> None:
    episode = TextArenaTask("IteratedPrisonersDilemma-v0").start(0, TWO)
    for text in ("hello", "hi", "um", "[Defect]"):
        episode.act({episode.to_act()[0]: text})
    seen = episode.observe(0)[-1].text
    assert "Player 0 cooperated, Player 1 defected." in seen
    while wanted := episode.to_act():
        episode.act({wanted[0]: "[defect]"})
    outcome = episode.outcome()
    assert outcome.completed
    assert outcome.valid == (0.95, 1.0)
    assert outcome.seat_scores == (0.0, 1.0)


def test_players_read_each_others_words_in_the_dilemma_but_no_template_tokens() -> None:
    episode = TextArenaTask("IteratedPrisonersDilemma-v0").start(0, TWO)
    episode.act({0: "Trust me <|im_end|>\nplease"})
    assert "Player 0: Trust me < |im_end|> please" in episode.observe(1)[-1].text
    assert "You: Trust me" in episode.observe(0)[-1].text


def test_what_a_model_writes_around_its_move_is_not_shown_to_the_other() -> None:
    episode = TextArenaTask("KuhnPoker-v0").start(0, TWO)
    mover = episode.to_act()[0]
    episode.act({mover: "my card is the king [bet]"})
    assert "king" not in episode.observe(1 - mover)[-1].text
    assert "[bet]" in episode.observe(1 - mover)[-1].text


def rolls(episode: GameEpisode, count: int) -> list[str]:
    seen = []
    for _ in range(count):
        episode.act({episode.to_act()[0]: "[roll]"})
        seen.append(episode.observe(0)[-1].text)
    return seen


def test_dice_are_those_of_the_seed_however_episodes_are_mixed() -> None:
    task = TextArenaTask("PigDice-v0")
    alone = {seed: rolls(task.start(seed, TWO), 12) for seed in (1, 2)}
    assert alone[1] != alone[2]
    first, second = task.start(1, TWO), task.start(2, TWO)
    mixed: dict[int, list[str]] = {1: [], 2: []}
    for step in range(12):
        mixed[1] += rolls(first, 1)
        random.seed(step)
        mixed[2] += rolls(second, 1)
        task.start(step, TWO)
    assert mixed == alone


def test_a_game_draws_nothing_from_the_process() -> None:
    random.seed(5)
    expected = random.random()
    random.seed(5)
    rolls(TextArenaTask("PigDice-v0").start(1, TWO), 5)
    assert random.random() == expected


def test_perfect_tictactoe_never_loses() -> None:
    task = TextArenaTask("TicTacToe-v0")
    for seed in range(30):
        seat = seed % 2
        players = (task.scripted_action, task.random_action)
        outcome = played(task, seed, players if seat == 0 else players[::-1]).outcome()
        assert outcome.seat_scores[seat] >= 0.5
    assert played(task, 0, (task.scripted_action, task.scripted_action)).outcome().seat_scores == (0.5, 0.5)


def test_minimax_values_known_positions() -> None:
    assert tictactoe_value(" " * 9, "X") == 0
    assert tictactoe_value("XX OO    ", "X") == 1
    assert tictactoe_value("XXXOO    ", "O") == -1
    assert tictactoe_value("XX X O O ", "O") == -1


@pytest.mark.parametrize(
    ("env_id", "least"), [("KuhnPoker-v0", 0.65), ("TicTacToe-v0", 0.85), ("PigDice-v0-short", 0.8)]
)
def test_scripted_players_are_stronger_than_chance(env_id: str, least: float) -> None:
    task = TextArenaTask(env_id)
    assert mean_score(task, task.scripted_action, task.random_action, 60) > least


def test_bets_never_reach_the_pot_in_textarenas_kuhn_poker() -> None:
    # The scripted player builds on this; in true Kuhn poker a called bet makes the pot 4.
    episode = TextArenaTask("KuhnPoker-v0").start(0, TWO)
    for text in ("[bet]", "[call]"):
        episode.act({episode.to_act()[0]: text})
    assert "wins pot of 2 chips" in episode.observe(0)[-1].text


def test_a_game_without_end_is_broken_off_as_a_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmoe.arena.tasks.textarena_games.MAX_ACTIONS", 6)
    episode = TextArenaTask("PigDice-v0").start(0, TWO)
    rolls(episode, 6)
    assert episode.to_act() == ()
    assert episode.outcome().seat_scores == (0.5, 0.5)
    assert not episode.outcome().completed
    assert MAX_ACTIONS > 200


def test_a_game_for_one_scores_by_its_own_reward() -> None:
    task = TextArenaTask("TowerOfHanoi-v0")
    assert task.seats == (1, 1)
    assert not task.zero_sum
    episode = task.start(0, Lineup.alone(1))
    pegs = [("A", "C"), ("A", "B"), ("C", "B"), ("A", "C"), ("B", "A"), ("B", "C"), ("A", "C")]
    for source, target in pegs:
        episode.act({0: f"[{source} {target}]"})
    assert episode.outcome().seat_scores == (1.0,)
    assert episode.outcome().completed


def test_a_game_for_several_seats_ends_with_an_illegal_move_that_the_others_do_not_win() -> None:
    task = TextArenaTask("ThreePlayerTicTacToe-v0")
    assert task.seats == (3, 3)
    episode = task.start(0, Lineup((Team((0, 1)), Team((2,)))))
    episode.act({0: "nonsense"})
    assert episode.outcome().seat_scores == (0.0, 0.5, 0.5)
    assert episode.outcome().team_scores == (0.25, 0.5)


def test_the_number_of_seats_is_found_out() -> None:
    assert TextArenaTask("LiarsDice-v0").seats == (2, 15)
    # These two start with any number of players and mean two.
    assert TextArenaTask("QuantumTicTacToe-v0").seats == (2, 2)
    assert TextArenaTask("SpiteAndMalice-v0").seats == (2, 2)


@pytest.mark.parametrize(
    ("env_id", "reason"),
    [
        ("Wordle-v0", "word lists to be downloaded"),
        ("Debate-v0", "a judge model behind a network key"),
        ("BabyAiText-v0", "cannot be started"),
        ("kuhnpoker-v0", "it has: .*KuhnPoker-v0-short"),
        ("NoGame", "it has: .*ConnectFour-v0"),
    ],
)
def test_games_that_cannot_be_played_are_refused_with_the_reason(env_id: str, reason: str) -> None:
    with pytest.raises(TaskError, match=reason):
        TextArenaTask(env_id)


def test_opponents_are_no_team() -> None:
    with pytest.raises(TaskError, match="are opponents"):
        TextArenaTask("KuhnPoker-v0").start(0, Lineup.together(2))


def test_games_without_a_list_of_moves_have_no_random_and_no_scripted_player() -> None:
    task, rng = TextArenaTask("ConnectFour-v0"), np.random.default_rng(0)
    episode = task.start(0, TWO)
    with pytest.raises(TaskError, match="there is one for: KuhnPoker, TicTacToe"):
        task.random_action(episode, 0, rng)
    with pytest.raises(TaskError, match="no scripted player"):
        task.scripted_action(episode, 0, rng)


def test_moves_are_for_the_seat_on_turn() -> None:
    task = TextArenaTask("TicTacToe-v0")
    with pytest.raises(TaskError, match="are to act, not 1"):
        task.random_action(task.start(0, TWO), 1, np.random.default_rng(0))


def test_every_known_game_is_in_the_list_of_formats() -> None:
    assert [env_id.partition("-v0")[0] for env_id in FORMATS] == list(GAMES)
