#!/usr/bin/env bash
# Start the coordinator in the background; all options go to run_coordinator.py.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if wants_help "$@"; then
    echo "Usage: start_coordinator.sh [OPTIONS OF run_coordinator.py]"
    echo "Starts the coordinator in the background: pid file in $run_dir, log in $log_dir (FEDMOE_RUN_DIR, FEDMOE_LOG_DIR)."
    exec "$python" "$root/run_coordinator.py" --help
fi

make_folders
name=coordinator
log=$log_dir/$name.log
offset=$(size_of "$log")
# Without a state directory of the caller's choice it is always the same one, wherever this is run from.
if ! has_option --state-dir "$@" && [[ -z ${FEDMOE_COORDINATOR_STATE_DIR:-} ]]; then
    set -- "$@" --state-dir "$root/runs/coordinator"
fi
# New tokens are printed once, on standard output: they go to this terminal and not into a log. They count even if the
# start fails later (a port in use), so they are shown whatever happens.
announcement=$(mktemp "$run_dir/announcement.XXXXXX")
trap 'cat -- "$announcement"; rm -f -- "$announcement"' EXIT
launch "$name" "$log" "$announcement" "$root/run_coordinator.py" "$@"

scheme=http
if has_option --tls-cert "$@" || [[ -n ${FEDMOE_COORDINATOR_TLS_CERT:-} ]]; then scheme=https; fi

# Prints the URL once the process whose log says it listens also answers.
answering_url() {
    log_since "$log" "$offset" | "$python" -c '
import json, ssl, sys, urllib.request
pid, scheme = int(sys.argv[1]), sys.argv[2]
for line in sys.stdin:
    try:
        record = json.loads(line)
    except ValueError:
        continue
    if record.get("event") == "listening" and record.get("pid") == pid:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(record["host"], record["host"])
        port = record["port"]
        url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
        context = ssl.create_default_context()
        # Only whether our own process answers: its certificate names the host that workers use.
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
        try:
            with opener.open(url + "/healthz", timeout=5):
                print(url)
        except OSError:
            pass
' "$started_pid" "$scheme"
}

deadline=$(($(date +%s) + start_seconds))
url=""
while [[ -z $url ]]; do
    child_runs "$started_pid" || failed_start "$name" "$log" "$offset"
    (($(date +%s) < deadline)) || die "$name does not answer after $start_seconds s; it still runs, see $log"
    sleep 0.2
    url=$(answering_url)
done

sed "5s|.*|$url|" "$run_dir/$name.info" >"$run_dir/$name.info.new"
mv -f -- "$run_dir/$name.info.new" "$run_dir/$name.info"
echo "$name runs: process id $started_pid, $url, log $log"
