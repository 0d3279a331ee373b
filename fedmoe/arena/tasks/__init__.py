"""The tasks that come with FedMoE."""
