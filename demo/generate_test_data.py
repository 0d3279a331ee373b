#!/usr/bin/env python3
"""Make sample records of a multi-model training run."""

from fedmoe.cli.arena_charts import generate_main

if __name__ == "__main__":
    generate_main()
