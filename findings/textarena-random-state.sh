#!/usr/bin/env bash
# TextArena 0.7.4: all games of a process share one random state, and a reset with a seed sets it for the whole program.
#
# Expected: a game that is reset with a seed and gets the same moves goes the same way, whatever other games do; the
#   program's own random numbers stay as they were.
# Happens: reset(seed=...) calls random.seed, and the dice of later moves come from that shared state. A game of PigDice
#   with seed 7 rolls other dice as soon as another game is reset between its moves, and a program that draws from
#   `random` after a reset draws what the game's seed says. Games played side by side, as for batches, do not repeat.
# Seen: 30 November 2026.
# Output, from which any difference ends this script with 1:
#> the same game twice, alone: the same game
#> alone and beside another game: another game
#> the program's seeds 1 and 2, after a reset: same number
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
sed -n 's/^#> //p' "$0" >"$directory/expected"
"${PYTHON:-python3}" -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check textarena==0.7.4
cd "$directory"
venv/bin/python - >seen <<'PROGRAM'
import random

import textarena


def dice(beside):
    """What is seen of six rolls of a game with seed 7, perhaps with another game reset before each."""
    game, neighbour = textarena.make("PigDice-v0-raw"), textarena.make("PigDice-v0-raw")
    game.reset(num_players=2, seed=7)
    told = ""
    for number in range(6):
        told += str(game.get_observation())
        if beside:
            neighbour.reset(num_players=2, seed=number)
        if game.step("[roll]")[0]:
            break
    return told


def drawn(own_seed):
    random.seed(own_seed)
    textarena.make("PigDice-v0-raw").reset(num_players=2, seed=7)
    return random.random()


print("the same game twice, alone:", "the same game" if dice(False) == dice(False) else "another game")
print("alone and beside another game:", "the same game" if dice(False) == dice(True) else "another game")
print("the program's seeds 1 and 2, after a reset:", "same number" if drawn(1) == drawn(2) else "other number")
PROGRAM
cat seen
diff "$directory/expected" seen
