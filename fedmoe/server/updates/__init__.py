"""The path of an update: upload, check, decision, journal, publication."""
