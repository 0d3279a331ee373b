#!/usr/bin/env bash
# List what an installation is made of: a bill of materials (CycloneDX, JSON) and the licences (Markdown).
set -euo pipefail
# shellcheck source=scripts/tools.sh
source "$(dirname "${BASH_SOURCE[0]}")/tools.sh"

if [[ ${1-} == --help || ${1-} == -h ]]; then
    echo "Usage: sbom.sh [ENVIRONMENT] [FOLDER]"
    echo "Writes sbom.cdx.json and licences.md of a virtual environment (default .venv-locked) into FOLDER (default dist)."
    exit 0
fi
environment=${1:-$root/.venv-locked}
folder=${2:-$root/dist}
[[ -x $environment/bin/python ]] || {
    echo "error: there is no $environment/bin/python; make it with scripts/install_locked.sh cpu" >&2
    exit 2
}
install_tool cyclonedx-bom
install_tool pip-licenses
mkdir -p -- "$folder"
"$tools/cyclonedx-py" environment --pyproject "$root/pyproject.toml" --output-reproducible --validate \
    --output-file "$folder/sbom.cdx.json" "$environment/bin/python"
"$tools/pip-licenses" --python "$environment/bin/python" --from mixed --with-urls --format markdown \
    --output-file "$folder/licences.md" >/dev/null
echo "wrote $folder/sbom.cdx.json and $folder/licences.md"
