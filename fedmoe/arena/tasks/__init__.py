"""The task protocol, and the tasks that come with FedMoE."""
