"""Policy learning: loss, gradient steps, learning rates and ranks."""
