"""TextArena tasks: its offline games, strict about illegal moves, reproducible even where episodes interleave."""

from __future__ import annotations

import importlib
import random
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, cast

import numpy as np

from fedmoe.arena.tasks.problems import quote
from fedmoe.arena.tasks.task import Episode, Lineup, Outcome, PromptMessage, TaskError, check_actions, check_lineup
from fedmoe.arena.tasks.textarena_rules import GAMES, NEEDS_MORE, Game, GameState, family

#: How much of the past a seat is shown besides the rules, and how much of the rules, in characters.
HISTORY_CHARS = 500
RULES_CHARS = 2400
#: How much of another player's text is shown, in characters.
QUOTE_CHARS = 160
#: An episode longer than this many actions is broken off.
MAX_ACTIONS = 400
_MOST_SEATS = 16
_UNKNOWN = Game(lambda state: (), 64, talk=True)
_lock = threading.Lock()

_Entry = tuple[int, str, object]


class _State(Protocol):
    current_player_id: int
    done: bool
    error_allowance: int
    error_count: int
    rewards: Mapping[int, float] | None
    game_info: Mapping[int, Mapping[str, object]]
    game_state: GameState
    observations: Mapping[int, list[_Entry]]


class _Env(Protocol):
    state: _State

    def reset(self, num_players: int, seed: int | None = None) -> object: ...

    def step(self, action: str) -> tuple[bool, object]: ...

    def get_observation(self) -> tuple[int, list[_Entry]]: ...


class _Randomness:
    """Python's and NumPy's process-wide random states, as one episode left them.

    TextArena seeds the process and its games draw from it in `step`; so each episode brings its own state along, one
    at a time, and that of the process is given back.
    """

    def __init__(self, seed: int) -> None:
        self._python = random.Random(seed).getstate()  # noqa: S311 (a game's dice, not a secret)
        self._numpy = np.random.RandomState(seed % 2**32).get_state()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Run the game's code under this state."""
        with _lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            python, numpy = random.getstate(), np.random.get_state()
            random.setstate(self._python)
            np.random.set_state(self._numpy)
            try:
                yield
            finally:
                self._python, self._numpy = random.getstate(), np.random.get_state()
                random.setstate(python)
                np.random.set_state(numpy)


def _make(env_id: str) -> _Env:
    try:
        textarena = importlib.import_module("textarena")
    except ImportError as error:
        raise TaskError(f"games need the package textarena ({error}); install fedmoe[arena]") from error
    registry = importlib.import_module("textarena.envs.registration").ENV_REGISTRY
    if env_id not in registry:
        near = sorted(game for game in registry if family(game).casefold() == family(env_id).casefold())
        all_games = sorted(game for game in registry if game.endswith("-v0") and family(game) not in NEEDS_MORE)
        raise TaskError(f"textarena has no game {env_id!r}; it has: {', '.join(near or all_games)}")
    return cast(_Env, textarena.make(env_id))


class GameEpisode:
    """One game; the first illegal move ends it."""

    def __init__(self, env_id: str, seed: int, lineup: Lineup) -> None:
        self._lineup = lineup
        self._game = GAMES.get(family(env_id))
        self._randomness = _Randomness(seed)
        self._seen: list[list[_Entry]] = [[] for _ in range(lineup.seats)]
        self._actions = [0] * lineup.seats
        self._illegal = [0] * lineup.seats
        self._broken_by: int | None = None
        self._over = False
        with self._randomness.installed():
            self._env = _make(env_id)
            self._env.reset(num_players=lineup.seats, seed=seed)
            self._inner = self._env
            # Wrappers forward what they do not have, so look at their own attributes only.
            while "env" in vars(self._inner):
                self._inner = cast(_Env, vars(self._inner)["env"])
            # TextArena lets a player try again once, and then some games loop for ever: so each is broken off here, at
            # the first illegal move, while TextArena still waits for the second.
            self._inner.state.error_allowance = 1
            self._listen()

    @property
    def state(self) -> GameState:
        """The game's own state, for scripted players; not to be changed."""
        return self._inner.state.game_state

    def to_act(self) -> tuple[int, ...]:
        """The seat on turn."""
        return () if self._over else (self._inner.state.current_player_id,)

    def observe(self, seat: int) -> tuple[PromptMessage, ...]:
        """The rules, the latest part of the past, and what can be done."""
        if not 0 <= seat < self._lineup.seats:
            raise TaskError(f"there are seats 0 to {self._lineup.seats - 1}, got {seat}")
        entries = [*self._seen[seat], *self._inner.state.observations.get(seat, [])]
        rules = entries[0][1].strip()[:RULES_CHARS] if entries else ""
        history = _recent(entries[1:], seat, self._game or _UNKNOWN)
        return (PromptMessage("system", rules), PromptMessage("user", "\n".join([*history, self._reminder()])))

    def act(self, actions: Mapping[int, str]) -> None:
        """One move."""
        check_actions(self.to_act(), actions)
        ((seat, text),) = actions.items()
        self._actions[seat] += 1
        misread = self._game is not None and self._game.lenient and not self._game.readable(self.state, text)
        with self._randomness.installed():
            illegal = self._step(text)
            if illegal:
                self._broken_by = seat
            self._over = illegal or self._inner.state.done or sum(self._actions) >= MAX_ACTIONS
            if not self._over:
                self._listen()
        self._illegal[seat] += int(illegal or misread)

    def outcome(self) -> Outcome:
        """Wins, draws and losses."""
        if not self._over:
            raise TaskError(f"the game is not over: seat {self.to_act()[0]} is to act")
        scores = self._scores()
        return Outcome(
            seat_scores=scores,
            team_scores=tuple(float(np.mean([scores[seat] for seat in team.seats])) for team in self._lineup.teams),
            valid=tuple(
                1.0 - illegal / taken if taken else 1.0
                for illegal, taken in zip(self._illegal, self._actions, strict=True)
            ),
            completed=self._broken_by is None and self._inner.state.rewards is not None,
        )

    def _step(self, text: str) -> bool:
        """Whether the action was illegal."""
        state = self._inner.state
        seat = state.current_player_id
        try:
            self._env.step(text)
        except Exception:
            # Games raise all kinds of things on text that they did not expect: that is an illegal move. On a legal one
            # of a game known here it is a fault.
            if self._game is not None and self._game.readable(self.state, text):
                raise
            return True
        return state.error_count > 0 or bool(state.game_info[seat].get("invalid_move"))

    def _reminder(self) -> str:
        if self._over:
            return "The game is over."
        if self._game is None:
            return "Your turn."
        if self._game.free(self.state):
            return "Your turn. Say one short sentence to the other player."
        return f"Your turn. Reply with one of: {' '.join(self._game.legal(self.state))}"

    def _listen(self) -> None:
        seat, entries = self._inner.get_observation()
        self._seen[seat].extend(entries)

    def _scores(self) -> tuple[float, ...]:
        seats = self._lineup.seats
        rewards = self._inner.state.rewards
        if self._broken_by is not None:
            others = 1.0 if seats == 2 else 0.5
            return tuple(0.0 if seat == self._broken_by else others for seat in range(seats))
        if rewards is None:
            return (0.0,) if seats == 1 else (0.5,) * seats
        if seats == 1:
            return (min(max(float(rewards[0]), 0.0), 1.0),)
        return tuple(min(max((float(rewards[seat]) + 1.0) / 2.0, 0.0), 1.0) for seat in range(seats))


def _recent(entries: list[_Entry], seat: int, game: Game) -> list[str]:
    """The last lines within `HISTORY_CHARS`; of the boards the latest only, players' own words if they matter."""
    boards = [index for index, (_, _, kind) in enumerate(entries) if _kind(kind) == "GAME_BOARD"]
    lines: list[str] = []
    room = HISTORY_CHARS
    for index in range(len(entries) - 1, -1, -1):
        sender, text, kind = entries[index]
        spoken, board = _kind(kind) == "PLAYER_ACTION", _kind(kind) == "GAME_BOARD"
        if (board and index != boards[-1]) or (spoken and not game.talk) or (game.board_only and not board):
            continue
        name = "You" if sender == seat else f"Player {sender}"
        line = f"{name}: {quote(text, QUOTE_CHARS)}" if spoken else text.strip()
        room -= len(line)
        if room < 0 and lines:
            break
        lines.append(line[-HISTORY_CHARS:])
    return lines[::-1]


def _kind(kind: object) -> str:
    return str(getattr(kind, "name", ""))


class TextArenaTask:
    """A game of TextArena, `env_id` as it is registered there, for example `KuhnPoker-v0-short`.

    A seat sees the rules as the system message and the latest part of the past, bounded by `HISTORY_CHARS`, with the
    legal moves where they are known. Win 1, draw 0.5, loss 0; in a game for one, TextArena's own reward from 0 to 1.
    An illegal move loses at once: against one opponent that one wins by the rules (with more, they draw), `valid` of
    the mover is below 1 and `completed` is False, so a reader who measures skill takes completed games only. In the
    prisoner's dilemma a decision that cannot be read counts as cooperation by TextArena's rule; the game goes on, and
    `valid` says so. A game of more than `MAX_ACTIONS` actions is broken off as a draw, `completed` False. Two seats
    are opponents: each is its own team.
    """

    strategies: tuple[str, ...] = ()

    def __init__(self, env_id: str) -> None:
        """Raises TaskError: no such game, one that cannot be played offline, or one that does not obey its seed."""
        if family(env_id) in NEEDS_MORE:
            raise TaskError(f"{env_id} cannot be played offline: it needs {NEEDS_MORE[family(env_id)]}")
        self._env_id = env_id
        self._game = GAMES.get(family(env_id))
        self.seats = (2, 2) if self._game else _seats_of(env_id)
        lineup = Lineup.alone(self.seats[0])
        first, second = GameEpisode(env_id, 1, lineup), GameEpisode(env_id, 1, lineup)
        if any(first.observe(seat) != second.observe(seat) for seat in range(lineup.seats)):
            raise TaskError(f"{env_id} does not obey its seed, so its episodes cannot be repeated; take another game")

    @property
    def name(self) -> str:
        """`textarena:<env_id>`."""
        return f"textarena:{self._env_id}"

    @property
    def zero_sum(self) -> bool:
        """Games for two: one seat's win is the other's loss."""
        return self.seats == (2, 2)

    @property
    def max_action_tokens(self) -> int:
        """Enough for every legal move of the known games; 64 for others."""
        return (self._game or _UNKNOWN).max_action_tokens

    @property
    def scripted(self) -> bool:
        """Whether there is a player of known strength, see `scripted_action`."""
        return self._game is not None and self._game.scripted is not None

    def start(self, seed: int, lineup: Lineup) -> GameEpisode:
        """A new game."""
        check_lineup(self, lineup)
        if lineup.seats == 2 and len(lineup.teams) != 2:
            raise TaskError(f"the two seats of {self.name} are opponents, so each is a team; got {lineup.teams}")
        return GameEpisode(self._env_id, seed, lineup)

    def random_action(self, episode: Episode, seat: int, rng: np.random.Generator) -> str:
        """A uniformly drawn legal move of `seat`, whose turn it is; raises TaskError for games without a list."""
        game = _turn(episode, seat)
        if self._game is None:
            raise TaskError(f"no list of legal moves is known for this game; there is one for: {', '.join(GAMES)}")
        legal = self._game.legal(game.state)
        return legal[int(rng.integers(len(legal)))]

    def scripted_action(self, episode: Episode, seat: int, rng: np.random.Generator) -> str:
        """The move of a strong player: perfect tic-tac-toe, never folding in TextArena's Kuhn poker, hold at 20 in pig,
        uniform in matching pennies and rock-paper-scissors; raises TaskError for other games."""
        game = _turn(episode, seat)
        if self._game is None or self._game.scripted is None:
            scripted = ", ".join(name for name, each in GAMES.items() if each.scripted)
            raise TaskError(f"{self.name} has no scripted player; there is one for: {scripted}")
        return self._game.scripted(game.state, seat, rng)


def _turn(episode: Episode, seat: int) -> GameEpisode:
    if not isinstance(episode, GameEpisode):
        raise TaskError(f"this is not a game of TextArena: {type(episode).__name__}")
    if seat not in episode.to_act():
        raise TaskError(f"seats {episode.to_act()} are to act, not {seat}")
    return episode


def _seats_of(env_id: str) -> tuple[int, int]:
    """The least number of players a game starts with, and the most up to which every number works."""
    works: list[int] = []
    reason = ""
    for seats in range(1, _MOST_SEATS + 1):
        try:
            GameEpisode(env_id, 1, Lineup.alone(seats)).observe(seats - 1)
        except TaskError:
            raise
        except Exception as error:  # a game says no in its own way: assert, KeyError, missing files
            reason = reason or f"{type(error).__name__}: {error}"
            if works:
                break
        else:
            works.append(seats)
    if not works:
        raise TaskError(f"{env_id} cannot be started with 1 to {_MOST_SEATS} players: {reason[:300]}")
    # A game that starts with any number does not check it; TextArena's games without a check are for two.
    return (2, 2) if works[:2] == [1, 2] else (works[0], works[-1])
