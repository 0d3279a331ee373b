"""The state of a federation at a moment: what workers say of themselves, what happened lately, for pages and tools."""
