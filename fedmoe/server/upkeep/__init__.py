"""What the coordinator does beside updates: background merges, rollbacks, retention, erasure."""
