#!/usr/bin/env python3
"""The specification's name for `fedmoe gateway`: print, save, list."""

from fedmoe.cli import get_gateway_model

if __name__ == "__main__":
    get_gateway_model()
