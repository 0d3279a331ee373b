"""From files to token batches: rows, formats, chat rendering, packing, and the three demo domains."""
