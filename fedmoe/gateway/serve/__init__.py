"""Gateway server: an OpenAI-compatible HTTP interface to the gateway and every expert, updated while it runs."""
