#!/usr/bin/env bash
# Have a Chromium for the tests of the page: one that is there, or Debian's, installed as root.
set -euo pipefail
if [[ -n ${FEDMOE_CHROMIUM-} ]] || command -v chromium >/dev/null; then
    exit 0
fi
if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
    echo "error: no chromium here; install one and name it in FEDMOE_CHROMIUM" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get install --yes --quiet --no-install-recommends chromium >/dev/null || {
    apt-get update --quiet >/dev/null
    apt-get install --yes --quiet --no-install-recommends chromium >/dev/null
}
