#!/usr/bin/env bash
# Stop a worker that start_worker.sh started; it delivers what it has learned first.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if wants_help "$@"; then
    echo "Usage: stop_worker.sh [ID]"
    echo "Sends SIGTERM to the worker and waits up to $stop_seconds s (FEDMOE_STOP_SECONDS)."
    echo "Without ID it stops the one worker there is, and asks which if there are several."
    exit 0
fi

id=$(option_value --worker-id "$@")
if [[ -z $id ]]; then
    (($# <= 1)) || die "stop_worker.sh takes one worker's id, got: $*" 2
    id=${1-}
fi
if [[ -z $id ]]; then
    # Ids hold no spaces, so words are enough (and the bash of macOS has no mapfile).
    workers=$(known_names | sed -n 's/^worker-//p')
    case $(wc -w <<<"$workers" | tr -d ' ') in
        0) echo "no worker was started from here"; exit 0 ;;
        1) id=$workers ;;
        *) die "which one? stop_worker.sh ID, with one of: ${workers//$'\n'/ }" 2 ;;
    esac
fi
[[ $id =~ ^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$ ]] || die "a worker's id has letters, digits, _ and -, got '$id'" 2
stop_process "worker-$id"
