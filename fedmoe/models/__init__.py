"""The only place that loads a base model, chooses its device and puts adapters on it."""
