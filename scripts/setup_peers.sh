#!/usr/bin/env bash
# Make the environments of the peers that benchmarks/bench_arena_throughput.py measures beside us, each of its own.
# Takes 1.4 and 2.4 GB of disk and a few minutes; a second run with the same versions does nothing.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
declare -A wanted=(
    [trl]="torch trl==1.16.0 transformers peft accelerate"
    [skyrl]="torch skyrl[tinker,jax]==0.3.0"
)
declare -A check=(
    [trl]="import trl, torch; print('TRL', trl.__version__, 'on torch', torch.__version__)"
    [skyrl]="import importlib.metadata as m, jax; print('SkyRL', m.version('skyrl'), 'on jax', jax.__version__)"
)

usage() {
    echo "Usage: setup_peers.sh [trl] [skyrl]"
    echo "Installs them (default: both) into .venv-trl and .venv-skyrl. PYTHON names the interpreter (3.11 or 3.12)."
}

for peer in "$@"; do
    case $peer in
        --help | -h) usage; exit 0 ;;
        trl | skyrl) ;;
        *) echo "error: setup_peers.sh knows trl and skyrl, got: $peer" >&2; exit 2 ;;
    esac
done
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || {
    echo "error: the peers need Python 3.11 or 3.12, $python is another; name one with PYTHON=python3.11" >&2
    exit 2
}
for peer in "${@:-trl skyrl}"; do
    for name in $peer; do
        folder=$root/.venv-$name
        constraints=$root/benchmarks/peers/constraints-$name.txt
        stamp=$(cat "$constraints" <(echo "${wanted[$name]}") | cksum)
        if [[ -r $folder/.installed && $(cat "$folder/.installed") == "$stamp" ]]; then
            echo "$name is installed in $folder"
            continue
        fi
        "$python" -m venv "$folder"
        # shellcheck disable=SC2086  # a list of packages
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" ${wanted[$name]}
        PYTHONSAFEPATH=1 "$folder/bin/python" -W ignore -c "${check[$name]}"
        echo "$stamp" >"$folder/.installed"
        echo "installed in $folder; FEDMOE_${name^^}_PYTHON names another place"
    done
done
