#!/usr/bin/env python3
"""Draw the charts of a multi-model training run."""

from fedmoe.cli.arena_charts import run_script, visualise

if __name__ == "__main__":
    run_script(visualise)
