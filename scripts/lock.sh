#!/usr/bin/env bash
# Write the lock files anew: every package of an installation, at the versions of constraints.txt, with its hashes.
#   requirements.lock              all but torch, for Linux, macOS and Windows
#   requirements-coordinator.lock  the part of it that a coordinator needs
#   requirements-torch-cuda.lock   torch and the CUDA libraries it needs
#   requirements-torch-cpu.lock    torch without CUDA, the build for this machine's platform and Python
set -euo pipefail
# shellcheck source=scripts/tools.sh
source "$(dirname "${BASH_SOURCE[0]}")/tools.sh"

if [[ ${1-} == --help || ${1-} == -h ]]; then
    echo "Usage: lock.sh"
    echo "Writes requirements.lock, and those of the coordinator and of both builds of torch. Not every registry has the CPU"
    echo "build: PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS names one that has; without it, its lock stays as it was."
    exit 0
fi
(($# == 0)) || { echo "error: lock.sh takes no arguments, got: $*" >&2; exit 2; }

cd "$root"
install_tool uv
compile=("$tools/uv" pip compile --quiet --generate-hashes --no-header --no-annotate --python-version 3.11)
work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT
# hatchling builds the project itself, which is then installed without reaching for anything that is not in the lock.
echo "hatchling>=1.27" | "${compile[@]}" --universal --extra arena --extra hub --extra postgres --extra ray --extra s3 \
    --constraint constraints.txt --output-file "$work/all" pyproject.toml - >/dev/null
what="made by scripts/lock.sh; install it with scripts/install_locked.sh"
for name in requirements requirements-torch-cuda; do echo "# $name.lock: $what" >"$work/$name.lock"; done
awk -v work="$work" '
    /^[a-z]/ { cuda = /^(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==/ && !/^nvidia-ml-py==/ }
    { print >> (work "/requirements" (cuda ? "-torch-cuda" : "") ".lock") }' "$work/all"
mv -- "$work/requirements.lock" "$work/requirements-torch-cuda.lock" .
echo "hatchling>=1.27" | "${compile[@]}" --universal --extra postgres --extra s3 --constraint requirements.lock \
    --output-file "$work/coordinator" pyproject.toml - >/dev/null
{ echo "# requirements-coordinator.lock: made by scripts/lock.sh; deploy/docker/Dockerfile installs it"; cat "$work/coordinator"; } \
    >requirements-coordinator.lock
torch=$(sed -n 's/^\(torch==[0-9.]*\).*/\1/p' requirements-torch-cuda.lock)
if "$tools/python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$work" "$torch+cpu"
then
    hash=$("$tools/python" -m pip hash "$work"/torch-*.whl | tail -n 1)
    printf '%s\n' "# requirements-torch-cpu.lock: $what" "$torch+cpu \\" "    $hash" >requirements-torch-cpu.lock
else
    echo "warning: $torch+cpu was not found, its lock stays as it was; name its place with PIP_EXTRA_INDEX_URL" >&2
fi
wc -l requirements*.lock
