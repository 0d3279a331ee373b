#!/usr/bin/env python3
"""Draw the charts of a multi-model training run."""

from fedmoe.cli.arena_charts import visualise_main

if __name__ == "__main__":
    visualise_main()
