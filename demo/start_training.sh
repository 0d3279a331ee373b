#!/usr/bin/env bash
# Multi-model training from a fresh clone: four policies, all four modes, charts at the end.
# Makes the environment on the first run; started again, it goes on where it stopped. Files: see the README beside this.
set -euo pipefail
cd "$(dirname "$0")/.."
make --no-print-directory arena-install
exec .venv/bin/python demo/run_training_server.py "$@"
