"""The rules of a federation, without I/O: events, transactions, aggregation, the online gateway."""
