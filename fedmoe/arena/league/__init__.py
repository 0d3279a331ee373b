"""The exchange of policies between an arena and a federation."""
