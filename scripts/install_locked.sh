#!/usr/bin/env bash
# Install FedMoE with nothing in it whose hash the lock files do not name.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
if [[ ${1-} == --help || ${1-} == -h ]]; then
    echo "Usage: install_locked.sh cpu|cuda [FOLDER]"
    echo "Makes a virtual environment (default .venv-locked) from requirements.lock and the lock of that build of torch,"
    echo "then puts the project into it. PYTHON names the interpreter (3.11 or later)."
    exit 0
fi
build=${1-}
[[ $build == cpu || $build == cuda ]] || { echo "error: say cpu or cuda, got '$build'" >&2; exit 2; }
(($# <= 2)) || { echo "error: install_locked.sh takes a build and one folder at most, got: $*" >&2; exit 2; }

folder=${2:-$root/.venv-locked}
"${PYTHON:-python3}" -m venv "$folder"
install=("$folder/bin/python" -m pip install --quiet --disable-pip-version-check)
"${install[@]}" --require-hashes -r "$root/requirements.lock" -r "$root/requirements-torch-$build.lock"
"${install[@]}" --no-deps --no-build-isolation "$root"
"$folder/bin/python" -m pip check
"$folder/bin/fedmoe" --version
echo "installed in $folder"
