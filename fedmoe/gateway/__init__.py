"""What is done with a gateway: measured, exported, served."""
