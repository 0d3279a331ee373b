#!/usr/bin/env bash
# Fuzz every reader of bytes from outside with atheris, each for some minutes of processor time.
set -euo pipefail
# shellcheck source=scripts/tools.sh
source "$(dirname "${BASH_SOURCE[0]}")/tools.sh"

readers=(container codec npz journal_rows jsonl json_array csv parquet arrow)
if [[ ${1-} == --help || ${1-} == -h ]]; then
    echo "Usage: fuzz.sh [MINUTES] [READER...]"
    echo "MINUTES of processor time each (default 10); readers: ${readers[*]} (default all)."
    echo "Results are added to benchmarks/results/fuzzing.json; needs the environment of 'make install'."
    exit 0
fi
minutes=${1:-10}
[[ $minutes =~ ^[0-9]+$ ]] || { echo "error: MINUTES must be a number, got '$minutes'" >&2; exit 2; }
shift $(($# > 0))
(($#)) && readers=("$@")

python=${FEDMOE_PYTHON:-$root/.venv/bin/python}
[[ -d $root/.cache/atheris ]] || "$python" -m pip install --quiet --disable-pip-version-check --no-deps \
    --target "$root/.cache/atheris" --constraint "$root/requirements-tools.txt" atheris
export PYTHONPATH=$root:$root/.cache/atheris OMP_NUM_THREADS=1
for reader in "${readers[@]}"; do
    nice "$python" "$root/tests/fuzz/fuzz.py" "$reader" --seconds $((minutes * 60)) \
        --results "$root/benchmarks/results/fuzzing.json"
done
