"""vLLM as a rollout engine and as a backend of the gateway server, over its HTTP interface."""
