"""Several LoRA policies that learn with and against each other in one task environment."""
