#!/usr/bin/env bash
# Make an environment with AReaL, apart from the project's own because its pins differ from ours.
# Takes 2.3 GB of disk and 2 to 5 minutes; a second run with the same versions does nothing.
set -euo pipefail

areal=areal==1.0.4
# AReaL's own dependencies ask for CUDA builds, a proxy server and six agent frameworks. These are what it imports for
# training on text; versions are in constraints-areal.txt.
imports=(
    torch transformers peft accelerate datasets safetensors tokenizers huggingface-hub torchdata ray numba openai
    aiohttp httpx uvloop aiofiles orjson pyyaml hydra-core==1.4.0.dev1 omegaconf==2.4.0.dev2 flask tenacity colorlog
    lark einops pillow pybase64 zstandard nvidia-ml-py tabulate math-verify swanlab trackio tensorboardX wandb
)
# What FedMoE's arena imports in its processes, its tasks, and its tests.
ours=(numpy ml-dtypes filelock psutil structlog stamina reasoning-gym textarena pytest pytest-timeout hypothesis)
# Its loss is compared with TRL's; TRL's pins are newer than AReaL's.
without_dependencies=("$areal" trl==1.16.0)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
constraints=$root/constraints-areal.txt

if [[ ${1-} == --help || ${1-} == -h ]]; then
    echo "Usage: setup_areal.sh [FOLDER]"
    echo "Installs $areal into FOLDER (default .venv-areal; 2.3 GB). PYTHON names the interpreter (3.11 or 3.12)."
    exit 0
fi
(($# <= 1)) || { echo "error: setup_areal.sh takes one folder at most, got: $*" >&2; exit 2; }

folder=${1:-$root/.venv-areal}
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || {
    echo "error: AReaL needs Python 3.11 or 3.12, $python is another; name one with PYTHON=python3.11" >&2
    exit 2
}
done_mark=$folder/.installed
# Another list of packages or another place of the project is another environment.
wanted=$(cat "${BASH_SOURCE[0]}" "$constraints" <(echo "$root") | cksum)
if [[ -r $done_mark && $(cat "$done_mark") == "$wanted" ]]; then
    echo "$areal is installed in $folder"
    exit 0
fi
"$python" -m venv "$folder"
install=("$folder/bin/python" -m pip install --quiet --disable-pip-version-check)
"${install[@]}" --constraint "$constraints" "${imports[@]}" "${ours[@]}"
"${install[@]}" --no-deps "${without_dependencies[@]}"
"${install[@]}" --no-deps --editable "$root"
# Whatever folder this runs from, one called areal must not be taken for the package.
PYTHONSAFEPATH=1 "$folder/bin/python" -W ignore -c \
    "import fedmoe.areal.actor, fedmoe.areal.workflow, torch; print('AReaL on torch', torch.__version__)" \
    | tail -n 1
echo "$wanted" >"$done_mark"
echo "installed in $folder; give $folder/bin/python to ArealLearner(python=...)"
