"""The HTTP contract, shared by the coordinator and everybody who talks to it."""
