"""The coordinator's HTTP routes."""
