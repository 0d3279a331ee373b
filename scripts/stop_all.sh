#!/usr/bin/env bash
# Stop everything these scripts started, and nothing else: workers first, so that their last updates arrive.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if wants_help "$@"; then
    echo "Usage: stop_all.sh"
    echo "Stops all workers of $run_dir, then its coordinator; each gets SIGTERM and up to $stop_seconds s."
    exit 0
fi
(($# == 0)) || die "stop_all.sh takes no arguments, got: $*" 2

names=$(known_names)
if [[ -z $names ]]; then
    echo "nothing runs"
    exit 0
fi
status=0
waiting=()
for name in $names; do
    if [[ $name != coordinator ]]; then
        stop_process "$name" &
        waiting+=($!)
    fi
done
for job in ${waiting[@]+"${waiting[@]}"}; do
    wait "$job" || status=1
done
if [[ -e $run_dir/coordinator.pid ]]; then
    stop_process coordinator || status=1
fi
exit "$status"
