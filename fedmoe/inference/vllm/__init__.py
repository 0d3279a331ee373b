"""vLLM as an engine and as a backend, over its HTTP interface."""
