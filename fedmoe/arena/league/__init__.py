"""How an arena and a federation exchange policies."""
