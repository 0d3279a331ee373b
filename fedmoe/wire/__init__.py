"""The HTTP contract and the coordinator's client."""
