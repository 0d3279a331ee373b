"""The coordinator as a service: one update's way through the house, routes, security, history."""
