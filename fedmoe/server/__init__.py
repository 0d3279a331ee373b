"""The coordinator as an HTTP service: updates, storage, access control, the evaluation gate, upkeep."""
