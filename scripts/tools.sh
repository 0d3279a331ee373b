# shellcheck shell=bash
# The environment of the programs in requirements-tools.txt; sourced, not run. Sets `tools` to its folder of programs.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
tools=${FEDMOE_TOOLS:-$root/.venv-tools}/bin

# install_tool NAME...: those of the file that are named, at its versions.
install_tool() {
    local name
    [[ -x $tools/python ]] || "${PYTHON:-python3}" -m venv "${tools%/bin}"
    for name; do
        "$tools/python" -m pip install --quiet --disable-pip-version-check --constraint "$root/requirements-tools.txt" "$name"
    done
}
