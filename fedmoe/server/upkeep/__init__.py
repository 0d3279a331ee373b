"""Background work of the coordinator: merges, undo, retention, erasure, sweeps."""
