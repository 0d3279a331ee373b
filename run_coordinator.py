#!/usr/bin/env python3
"""The specification's name for `fedmoe coordinator`."""

import sys

from fedmoe.cli import main

if __name__ == "__main__":
    main(["coordinator", *sys.argv[1:]])
