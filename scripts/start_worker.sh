#!/usr/bin/env bash
# Start a worker in the background; all options go to run_worker.py.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if wants_help "$@"; then
    echo "Usage: start_worker.sh --worker-id ID [OPTIONS OF run_worker.py]"
    echo "Starts a worker in the background: pid file in $run_dir, log in $log_dir (FEDMOE_RUN_DIR, FEDMOE_LOG_DIR)."
    exec "$python" "$root/run_worker.py" --help
fi

id=$(option_value --worker-id "$@")
id=${id:-${FEDMOE_WORKER_WORKER_ID:-}}
[[ -n $id ]] || die "start_worker.sh needs --worker-id ID; it also names the pid file and the log" 2
# The id becomes part of file names.
[[ $id =~ ^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$ ]] || die "--worker-id: letters, digits, _ and - (at most 63), got '$id'" 2

make_folders
name=worker-$id
log=$log_dir/$name.log
offset=$(size_of "$log")
if ! has_option --state-dir "$@" && [[ -z ${FEDMOE_WORKER_STATE_DIR:-} ]]; then
    set -- "$@" --state-dir "$root/runs/workers/$id"
fi
launch "$name" "$log" "$log" "$root/run_worker.py" "$@"

deadline=$(($(date +%s) + start_seconds))
while ! log_since "$log" "$offset" | grep -q '"event": "registered"'; do
    child_runs "$started_pid" || failed_start "$name" "$log" "$offset"
    if (($(date +%s) >= deadline)); then
        echo "$name is still getting its base model or waiting for the coordinator; follow it with: tail -f $log"
        break
    fi
    sleep 0.2
done
echo "$name runs: process id $started_pid, log $log"
