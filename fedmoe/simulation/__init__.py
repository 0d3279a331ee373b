"""Simulation of a federation: the real coordinator and real update bytes, many workers, a virtual clock."""
