"""The messages between workers, coordinator and tools."""
