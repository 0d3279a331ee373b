"""Uses of a gateway: evaluation, export and serving."""
