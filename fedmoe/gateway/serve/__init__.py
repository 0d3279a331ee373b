"""The gateway and every expert behind an OpenAI-compatible interface, exchanged for newer versions as they come."""
