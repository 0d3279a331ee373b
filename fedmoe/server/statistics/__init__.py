"""What workers report about their data, and who contributed what."""
