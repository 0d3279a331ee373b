#!/usr/bin/env python3
"""The specification's name for `fedmoe worker`."""

import sys

from fedmoe.cli import main

if __name__ == "__main__":
    main(["worker", *sys.argv[1:]])
