"""Inference: one protocol for rollouts and one for a gateway server, on transformers and on vLLM."""
