"""Messages between workers, coordinator and tools, validated with pydantic."""
