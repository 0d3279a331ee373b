"""How policies learn: loss, gradient steps, learning rates and ranks."""
