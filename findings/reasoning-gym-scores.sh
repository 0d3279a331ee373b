#!/usr/bin/env bash
# reasoning-gym 0.1.25: some data sets give full marks, or nearly, to wrong answers.
#
# Expected: score_answer gives 1.0 to right answers only; an answer that is the same for all questions scores near 0,
#   or near the share of questions that it answers.
# Happens: game_of_life_halting gives 1.0 to every text, also to the opposite of the stored answer (it compares the
#   truth of two non-empty strings). puzzle24 gives 1.0 to four numbers that make 24, whether or not they are the
#   question's. coin_flip gives up to 0.95 to "0" where the probability is, say, 0.3125 (shared first digits count).
#   A policy trained on these rewards learns a constant, and an evaluation cannot tell it from a right one.
# Seen: 30 November 2026.
# Output, from which any difference ends this script with 1:
#> game_of_life_halting: right for 0 of 20 questions, mean score 1.00
#> game_of_life_halting: right for 0 of 20 questions, mean score 1.00
#> puzzle24: right for 1 of 20 questions, mean score 1.00
#> coin_flip: right for 0 of 20 questions, mean score 0.90
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
sed -n 's/^#> //p' "$0" >"$directory/expected"
"${PYTHON:-python3}" -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check reasoning-gym==0.1.25
cd "$directory"
venv/bin/python - >seen <<'PROGRAM'
import reasoning_gym

QUESTIONS = 20


def mean_score(name, answer, right):
    data = reasoning_gym.create_dataset(name, seed=0, size=QUESTIONS)
    score = sum(data.score_answer(answer(item), item) for item in data) / QUESTIONS
    count = sum(right(item) for item in data)
    print(f"{name}: right for {count} of {QUESTIONS} questions, mean score {score:.2f}")


def opposite(item):
    return {"True": "False", "False": "True"}[item["answer"]]


mean_score("game_of_life_halting", opposite, lambda item: opposite(item) == item["answer"])
mean_score("game_of_life_halting", lambda item: "banana", lambda item: item["answer"] == "banana")
mean_score("puzzle24", lambda item: "1*1*4*6", lambda item: sorted(item["metadata"]["numbers"]) == [1, 1, 4, 6])
mean_score("coin_flip", lambda item: "0", lambda item: float(item["answer"]) == 0)
PROGRAM
cat seen
diff "$directory/expected" seen
