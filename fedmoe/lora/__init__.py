"""LoRA algebra on numpy arrays, without files, sockets, clocks, global random state or torch."""
