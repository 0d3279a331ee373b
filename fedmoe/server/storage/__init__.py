"""What survives a crash: the journal of events and the blobs they name."""
