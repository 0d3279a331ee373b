#!/usr/bin/env python3
"""Train several policies in one environment, with all modes; the run's files lie in the current folder."""

import sys
from pathlib import Path

from fedmoe.cli import main

if __name__ == "__main__":
    arguments = sys.argv[1:] or [str(Path(__file__).with_name("arena.toml")), "--resume"]
    main(["arena", "train", *arguments, *([] if "--out" in arguments else ["--out", "."])])
