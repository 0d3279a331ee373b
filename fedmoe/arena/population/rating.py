"""How strong each player is, and how sure that is: ratings from games between teams, with ties."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypedDict, cast

from openskill.models import BradleyTerryFull, BradleyTerryFullRating

#: What is known of a player before its first game: the mean, and the standard deviation around it.
PRIOR_MU = 25.0
PRIOR_SIGMA = 25.0 / 3.0
#: Half the width of a 95 % interval, in standard deviations.
Z95 = 1.96


class _PlayerState(TypedDict):
    mu: float
    sigma: float
    games: int


class _RatingsState(TypedDict):
    drift: float
    players: dict[str, _PlayerState]


@dataclass(frozen=True, slots=True)
class Rating:
    """A player's strength: mean `mu` and standard deviation `sigma` of the belief after `games` games."""

    mu: float = PRIOR_MU
    sigma: float = PRIOR_SIGMA
    games: int = 0

    @property
    def low(self) -> float:
        """The lower end of the 95 % interval."""
        return self.mu - Z95 * self.sigma

    @property
    def high(self) -> float:
        """The upper end of the 95 % interval."""
        return self.mu + Z95 * self.sigma

    @property
    def ordinal(self) -> float:
        """mu - 3 sigma: a strength that the player almost surely has; for ranking lists."""
        return self.mu - 3.0 * self.sigma


@dataclass(frozen=True, slots=True)
class RatingRow:
    """One line of the table: `low` and `high` are the ends of the 95 % interval mu +- 1.96 sigma."""

    player: str
    mu: float
    sigma: float
    games: int
    low: float
    high: float
    ordinal: float


def _whole(
    c: float,
    k: int,
    mu: float,
    sigma_squared: float,
    team: Sequence[BradleyTerryFullRating],
    rank: int,
    weights: list[float] | None = None,
) -> float:
    """Takes the whole of the variance that a game removes; the library's own default takes sigma / c of it."""
    return 1.0


class Ratings:
    """Ratings of players, learned or frozen, from games of two or more teams.

    The model is Bradley-Terry over all pairs of teams, updated by moment matching (Weng and Lin 2011, algorithm 1;
    openskill). For two teams Plackett-Luce gives the same numbers. For more it does not: with ties, which are the rule
    where several policies solve the same problem, openskill 6.2's Plackett-Luce moves five fresh players that ended
    1, 1, 3, 4, 5 by +1.0, +1.0, +1.6, -0.1, -3.4: the third gains more than the winners. A game removes all of the
    variance that the update finds (`_whole`), not sigma / c of it as by default: after 200 simulated games between
    pairs of six players the error is 2.3 points instead of 3.7, and 95.0 % of the true strengths lie in the 95 %
    interval (default: 93.9 %). With four players a game it is 88 to 91 %: their pairs are not independent.

    `drift` is added in quadrature to every sigma before a game (rating points): players that learn change.
    """

    def __init__(self, drift: float = 25.0 / 300.0) -> None:
        if not (math.isfinite(drift) and drift >= 0):
            raise ValueError(f"drift must be a number of at least 0, got {drift}")
        self._drift = drift
        self._model = BradleyTerryFull(mu=PRIOR_MU, sigma=PRIOR_SIGMA, tau=drift, gamma=_whole)
        self._players: dict[str, Rating] = {}

    def __contains__(self, player: object) -> bool:
        return player in self._players

    def __getitem__(self, player: str) -> Rating:
        """The rating of a player; raises ValueError for one that was never entered."""
        if player not in self._players:
            known = ", ".join(sorted(self._players)) or "nobody"
            raise ValueError(f"player {player!r} is not rated; call ensure() first. Rated: {known}")
        return self._players[player]

    def ensure(self, player: str) -> None:
        """Enter a player with the prior, if it is not known yet."""
        if not player:
            raise ValueError("a player needs a name, got an empty one")
        self._players.setdefault(player, Rating())

    def remove(self, player: str) -> None:
        """Forget a player; raises ValueError for one that was never entered."""
        self[player]
        del self._players[player]

    def copy_of(self, child: str, parent: str) -> None:
        """Enter `child`, or enter it anew, with its parent's mean, no games, and half the prior's spread on top.

        sigma = min(prior, sqrt(sigma_parent^2 + (prior / 2)^2)): a changed copy is not known as its parent is.
        """
        if not child:
            raise ValueError("a player needs a name, got an empty one")
        known = self[parent]
        self._players[child] = Rating(known.mu, min(PRIOR_SIGMA, math.hypot(known.sigma, PRIOR_SIGMA / 2)))

    def rate(self, teams: Sequence[Sequence[str]], scores: Sequence[float]) -> None:
        """Learn from one game: a score for each team, higher is better, equal is a tie.

        Raises ValueError for unknown players, for a player that stands twice in the game (against itself there is
        nothing to learn) and for scores that are not numbers; then nothing has changed.
        """
        self._check(teams, scores)
        before = [[self._known(player) for player in team] for team in teams]
        after = self._model.rate(before, scores=[float(score) for score in scores])
        for team, rated in zip(teams, after, strict=True):
            for player, rating in zip(team, rated, strict=True):
                games = self._players[player].games + 1
                self._players[player] = Rating(rating.mu, rating.sigma, games)

    def predict_win(self, a: str, b: str) -> float:
        """The probability that `a` beats `b`: Phi((mu_a - mu_b) / sqrt(2 beta^2 + sigma_a^2 + sigma_b^2))."""
        if a == b:
            self[a]
            return 0.5
        return self._model.predict_win([[self._known(a)], [self._known(b)]])[0]

    def separated(self, best: str, worst: str, z: float = Z95) -> bool:
        """Whether `best` lies above `worst` with no overlap of their intervals, `z` sigma to each side."""
        top, bottom = self[best], self[worst]
        return top.mu - z * top.sigma > bottom.mu + z * bottom.sigma

    def leader(self, players: Sequence[str]) -> tuple[str, float]:
        """Who of two or more players has the highest lower end, and how far it lies above the others' upper ends.

        In rating points; positive when the intervals say that the leader is the strongest.
        """
        if len(set(players)) < 2:
            raise ValueError(f"a leader needs somebody to lead, got {list(players)}")
        first = min(players, key=lambda player: (-self[player].low, player))
        return first, self[first].low - max(self[player].high for player in players if player != first)

    def table(self) -> tuple[RatingRow, ...]:
        """All players, the highest mean first, then by name."""
        order = sorted(self._players.items(), key=lambda entry: (-entry[1].mu, entry[0]))
        return tuple(RatingRow(name, r.mu, r.sigma, r.games, r.low, r.high, r.ordinal) for name, r in order)

    def state(self) -> dict[str, object]:
        """JSON types only; `from_state` gives equal ratings back."""
        players = {name: {"mu": r.mu, "sigma": r.sigma, "games": r.games} for name, r in self._players.items()}
        return {"drift": self._drift, "players": players}

    @classmethod
    def from_state(cls, state: Mapping[str, object]) -> Self:
        """The ratings that `state` wrote."""
        fields = cast(_RatingsState, state)
        ratings = cls(fields["drift"])
        ratings._players = {name: Rating(**player) for name, player in fields["players"].items()}
        return ratings

    def _known(self, player: str) -> BradleyTerryFullRating:
        rating = self[player]
        return self._model.create_rating([rating.mu, rating.sigma], player)

    def _check(self, teams: Sequence[Sequence[str]], scores: Sequence[float]) -> None:
        if len(teams) < 2 or len(teams) != len(scores) or any(not team for team in teams):
            raise ValueError(f"a game has two or more teams with players and a score for each, got {teams}, {scores}")
        if not all(math.isfinite(score) for score in scores):
            raise ValueError(f"scores must be finite numbers, got {list(scores)}")
        players = [player for team in teams for player in team]
        if len(set(players)) != len(players):
            raise ValueError(f"a player can stand only once in a rated game, got {teams}")
        for player in players:
            self[player]
