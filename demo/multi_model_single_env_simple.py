#!/usr/bin/env python3
"""Several models, one environment: the training system itself, `fedmoe arena train`, with the demo's configuration."""

import sys
from pathlib import Path

from fedmoe.cli import main

if __name__ == "__main__":
    given = sys.argv[1:]
    config = [] if any(one.endswith(".toml") for one in given) else [str(Path(__file__).with_name("arena.toml"))]
    main(["arena", "train", *config, *given])
