"""Rollout: playing episodes, held-out evaluation, tournaments and metrics."""
