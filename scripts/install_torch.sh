#!/usr/bin/env bash
# Install the pinned torch, in the build for CUDA or for the CPU alone, with the Python that PYTHON names.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
if [[ ${1-} == --help || ${1-} == -h ]]; then
    echo "Usage: install_torch.sh cpu|cuda"
    echo "Takes the build from the package index in use, else from PyTorch's own. Only Linux has two; elsewhere it does nothing."
    exit 0
fi
build=${1-}
[[ $# == 1 && ($build == cpu || $build == cuda) ]] || { echo "error: say cpu or cuda, got '$*'" >&2; exit 2; }
[[ $(uname -s) == Linux ]] || exit 0

version=$(sed -n 's/^torch==//p' "$root/constraints.txt")
install=("${PYTHON:-python3}" -m pip install --quiet --disable-pip-version-check --no-deps)
# A version with +cpu is above the same without in pip's order, so a build for CUDA is asked for by its exact name.
case $build in
cpu) wanted="torch==$version+cpu" place=https://download.pytorch.org/whl/cpu own="torch==$version+cpu" ;;
cuda) wanted="torch===$version" place=https://download.pytorch.org/whl/cu130 own="torch==$version+cu130" ;;
esac
"${install[@]}" "$wanted" 2>/dev/null && exit 0
echo "$wanted is not in the package index in use; taking it from $place" >&2
"${install[@]}" "$own" --index-url "$place" && exit 0
echo "error: no $build build of torch $version; name its place with PIP_EXTRA_INDEX_URL, or choose with make TORCH=cpu|cuda" >&2
exit 1
