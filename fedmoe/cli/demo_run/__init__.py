"""The demonstration: a whole federation on one machine, from nothing to a measured gateway."""
