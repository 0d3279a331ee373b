"""The HTTP routes of the coordinator."""
