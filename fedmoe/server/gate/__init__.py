"""The evaluation gate: offers candidate gateways, takes held-out scores, publishes the winner."""
