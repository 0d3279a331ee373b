"""Ground floor: LoRA algebra on numpy arrays; no file, socket, clock, global random state or torch."""
