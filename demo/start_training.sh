#!/usr/bin/env bash
# Multi-model training from a fresh clone: four policies, all four modes, charts at the end.
# Makes the environment on the first run; started again, it goes on where it stopped. Files: see the README beside this.
set -euo pipefail
cd "$(dirname "$0")/.."
make --no-print-directory arena-install
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" TOKENIZERS_PARALLELISM=false
exec .venv/bin/python demo/run_training_server.py "$@"
