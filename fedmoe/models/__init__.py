"""Base models, LoRA on them, and what training and sampling need: the only place that loads a base model."""
