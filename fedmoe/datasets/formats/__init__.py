"""From rows to samples: the formats of public data and their turns."""
