"""Runs of the arena in a browser, live, on this machine."""
