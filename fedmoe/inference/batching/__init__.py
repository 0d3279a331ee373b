"""Continuous batching of several adapters on one base model, in this process."""
