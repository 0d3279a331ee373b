"""Who may send what: tokens, quotas, turns, and refusals as problems."""
