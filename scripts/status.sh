#!/usr/bin/env bash
# Show what these scripts started: process id, running time, log, and the coordinator's experts.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if wants_help "$@"; then
    echo "Usage: status.sh"
    echo "Shows what runs out of $run_dir; exit status 0 if something runs, 3 if nothing does."
    echo "The coordinator's experts are shown too; where it asks for a token, set FEDMOE_TOKEN."
    exit 0
fi
(($# == 0)) || die "status.sh takes no arguments, got: $*" 2

url=""
found=0
for name in $(known_names); do
    pid=$(running_pid "$name")
    log=$(info "$name" 3)
    if [[ -z $pid ]]; then
        echo "$name: not running, its pid file is stale; log ${log:-unknown}"
        continue
    fi
    found=$((found + 1))
    echo "$name: running, process id $pid, for $(duration $(($(date +%s) - $(info "$name" 2)))), log $log"
    [[ $name != coordinator ]] || url=$(info "$name" 5)
done

if [[ -n $url ]]; then
    echo "coordinator at $url:"
    "$python" "$root/get_gateway_model.py" --coordinator-url "$url" --list-experts ||
        echo "(the coordinator runs, but its experts cannot be listed)"
fi
if ((found == 0)); then
    echo "nothing runs"
    # 3 is what service managers mean by "not running".
    exit 3
fi
