"""Statistics that workers send, and which worker contributed which updates."""
