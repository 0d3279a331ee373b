#!/usr/bin/env python3
"""Make sample records of a multi-model training run."""

from fedmoe.cli.arena_charts import generate, run_script

if __name__ == "__main__":
    run_script(generate)
