"""Where sampled text comes from: one protocol, several back ends."""
