"""Recovery, snapshots and checks of the journal."""
