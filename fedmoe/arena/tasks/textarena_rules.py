"""Rules of TextArena's small games: legal moves, what a player has to see, scripted players of known strength."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np

GameState = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Game:
    """One family of games.

    `legal`: the legal actions of the player to move; `free`: whether any text that is not empty is legal now.
    `scripted`: a player of known strength, (state, seat, random numbers) -> action; None where there is none.
    `board_only`: the latest board says everything. `talk`: players read each other's words. `lenient`: TextArena plays
    on with an action that it cannot read.
    """

    legal: Callable[[GameState], tuple[str, ...]]
    max_action_tokens: int
    scripted: Callable[[GameState, int, np.random.Generator], str] | None = None
    free: Callable[[GameState], bool] = lambda state: False
    board_only: bool = False
    talk: bool = False
    lenient: bool = False

    def readable(self, state: GameState, text: str) -> bool:
        """Whether an action is legal as far as its text goes: it has a legal one in it, whatever its case."""
        if self.free(state):
            return bool(text.strip())
        return any(action.casefold() in text.casefold() for action in self.legal(state))


def family(env_id: str) -> str:
    """`KuhnPoker` of `KuhnPoker-v0-short`."""
    return env_id.partition("-v0")[0]


def _cells(state: GameState) -> list[str]:
    return [cell or " " for row in cast(list[list[str]], state["board"]) for cell in row]


def _free_cells(state: GameState) -> tuple[str, ...]:
    return tuple(f"[{index}]" for index, cell in enumerate(_cells(state)) if cell == " ")


def _kuhn_actions(state: GameState) -> tuple[str, ...]:
    tree = state["current_legal_action_tree"]
    return tuple(f"[{action}]" for action in tree) if isinstance(tree, dict) else ()


def _deciding(state: GameState) -> bool:
    return state["phase"] == "decision"


def _dilemma_actions(state: GameState) -> tuple[str, ...]:
    return ("[Cooperate]", "[Defect]") if _deciding(state) else ("I will cooperate.", "I will defect.")


_LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))


@lru_cache(maxsize=8192)
def tictactoe_value(board: str, mover: str) -> int:
    """The minimax value of a position for the one to move: 1, 0 or -1. `board`: nine of "X", "O" and " "."""
    other = "O" if mover == "X" else "X"
    if any(board[a] == board[b] == board[c] == other for a, b, c in _LINES):
        return -1
    moves = [index for index, cell in enumerate(board) if cell == " "]
    return max((-tictactoe_value(_placed(board, index, mover), other) for index in moves), default=0)


def _placed(board: str, index: int, mover: str) -> str:
    return board[:index] + mover + board[index + 1 :]


def _perfect_tictactoe(state: GameState, seat: int, rng: np.random.Generator) -> str:
    board, mover, other = "".join(_cells(state)), "OX"[seat], "XO"[seat]
    values = {i: -tictactoe_value(_placed(board, i, mover), other) for i, cell in enumerate(board) if cell == " "}
    best = [index for index, value in values.items() if value == max(values.values())]
    return f"[{best[int(rng.integers(len(best)))]}]"


def _never_fold(state: GameState, seat: int, rng: np.random.Generator) -> str:
    """Bet, and call every bet. In TextArena 0.7.4 bets never reach the pot, so they cost nothing and only a fold loses:
    nothing does better, whatever the card."""
    options = _kuhn_actions(state)
    return "[call]" if "[call]" in options else "[bet]"


def _hold_at_twenty(state: GameState, seat: int, rng: np.random.Generator) -> str:
    """Roll until the turn is worth 20 (the best threshold for the points of one turn; Neller and Presser 2004)."""
    return "[hold]" if cast(int, state["turn_total"]) >= 20 else "[roll]"


def _uniform(*actions: str) -> Callable[[GameState, int, np.random.Generator], str]:
    return lambda state, seat, rng: actions[int(rng.integers(len(actions)))]


_COINS = ("[heads]", "[tails]")
_HANDS = ("[rock]", "[paper]", "[scissors]")

#: The games with a small action space; others can be played, but not by the random or a scripted player.
GAMES: Mapping[str, Game] = {
    "KuhnPoker": Game(_kuhn_actions, 8, _never_fold),
    "TicTacToe": Game(_free_cells, 8, _perfect_tictactoe, board_only=True),
    "PigDice": Game(lambda state: ("[roll]", "[hold]"), 8, _hold_at_twenty, board_only=True),
    # Uniform play is the equilibrium of both: no opponent does better than even against it.
    "IteratedMatchingPennies": Game(lambda state: _COINS, 8, _uniform(*_COINS)),
    "IteratedRockPaperScissors": Game(lambda state: _HANDS, 10, _uniform(*_HANDS)),
    "IteratedPrisonersDilemma": Game(_dilemma_actions, 24, free=lambda s: not _deciding(s), talk=True, lenient=True),
}

#: Families that need the network, word lists that are not in the wheel, or a judge with a key.
NEEDS_MORE: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("Codenames", "Crosswords", "DontSayIt", "Hangman", "LetterAuction"),
            *("SpellingBee", "WordChains", "WordLadder", "WordSearch", "Wordle"),
        ),
        "word lists to be downloaded",
    ),
    **dict.fromkeys(
        ("Debate", "GuessWho", "ScenarioPlanning", "TwentyQuestions"), "a judge model behind a network key"
    ),
}
