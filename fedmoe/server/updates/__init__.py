"""The way of an update: upload, decision, journal, publication."""
