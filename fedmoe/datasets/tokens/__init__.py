"""From samples to tokens, labels and packed blocks."""
