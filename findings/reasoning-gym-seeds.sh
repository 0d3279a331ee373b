#!/usr/bin/env bash
# reasoning-gym 0.1.25: the same seed makes other questions in another process, or for another size.
#
# Expected: question i of a data set follows from its name, its settings, the seed and i, so that workers, a restart and
#   a later evaluation meet the same questions, and a larger size adds questions.
# Happens: isomorphic_strings, polynomial_multiplication and ransom_note draw from Python sets, whose order
#   changes with every start of Python (PYTHONHASHSEED); gcd, as a control, does not. In acre another size changes
#   every question. Held-out questions chosen by seed or index in one process may be trained on in another.
#   With PYTHONHASHSEED set to one number everywhere the questions agree.
# Seen: 30 November 2026.
# Output, from which any difference ends this script with 1:
#> gcd: two processes: all the same; with one PYTHONHASHSEED: all the same
#> isomorphic_strings: two processes: not the same; with one PYTHONHASHSEED: all the same
#> polynomial_multiplication: two processes: not the same; with one PYTHONHASHSEED: all the same
#> ransom_note: two processes: not the same; with one PYTHONHASHSEED: all the same
#> acre: the first 30 questions of 30 and of 60: not the same
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
sed -n 's/^#> //p' "$0" >"$directory/expected"
"${PYTHON:-python3}" -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check reasoning-gym==0.1.25
cd "$directory"
cat >write.py <<'PROGRAM'
import json
import sys

import reasoning_gym

NAMES = ["gcd", "isomorphic_strings", "polynomial_multiplication", "ransom_note"]
made = {name: [item["question"] for item in reasoning_gym.create_dataset(name, seed=5, size=30)] for name in NAMES}
for size in (30, 60):
    data = reasoning_gym.create_dataset("acre", seed=5, size=size)
    made[f"acre {size}"] = [data[index]["question"] for index in range(30)]
json.dump(made, open(sys.argv[1], "w"))
PROGRAM
PYTHONHASHSEED=1 venv/bin/python write.py one
PYTHONHASHSEED=2 venv/bin/python write.py other
PYTHONHASHSEED=1 venv/bin/python write.py again
venv/bin/python - >seen <<'PROGRAM'
import json

one, other, again = (json.load(open(name)) for name in ("one", "other", "again"))


def said(left, right):
    return "all the same" if left == right else "not the same"


for name in one:
    if not name.startswith("acre"):
        print(f"{name}: two processes: {said(one[name], other[name])}; with one PYTHONHASHSEED: {said(one[name], again[name])}")
print(f"acre: the first 30 questions of 30 and of 60: {said(one['acre 30'], one['acre 60'])}")
PROGRAM
cat seen
diff "$directory/expected" seen
