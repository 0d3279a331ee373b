#!/usr/bin/env python3
"""Several models, one environment: the training system itself, `fedmoe arena train`, with the demo's configuration."""

import sys
from pathlib import Path

from fedmoe.cli import main

if __name__ == "__main__":
    main(["arena", "train", *(sys.argv[1:] or [str(Path(__file__).with_name("arena.toml"))])])
