#!/usr/bin/env bash
# Stop the coordinator that start_coordinator.sh started.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if wants_help "$@"; then
    echo "Usage: stop_coordinator.sh"
    echo "Sends SIGTERM to the coordinator of $run_dir and waits up to $stop_seconds s (FEDMOE_STOP_SECONDS)."
    exit 0
fi
(($# == 0)) || die "stop_coordinator.sh takes no arguments, got: $*" 2
stop_process coordinator
