#!/usr/bin/env python3
"""Train several policies in one environment, with all modes; the run's files lie in the current folder.

Takes every option of `fedmoe arena train`; without a configuration it is the demo's, and an earlier run goes on.
"""

import sys
from pathlib import Path

from fedmoe.cli import main

if __name__ == "__main__":
    given = sys.argv[1:]
    names = {argument.partition("=")[0] for argument in given}
    config = [] if any(name.endswith(".toml") for name in names) else [str(Path(__file__).with_name("arena.toml"))]
    resume = [] if names & {"--fresh", "--resume"} else ["--resume"]
    out = [] if "--out" in names else ["--out", "."]
    main(["arena", "train", *config, *given, *resume, *out])
