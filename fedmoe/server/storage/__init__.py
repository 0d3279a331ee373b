"""Durable storage: the journal of events, the blobs they name, backup and restore."""
