"""The past of experts: recovery, snapshots, undo by replay, pruning, verification."""
