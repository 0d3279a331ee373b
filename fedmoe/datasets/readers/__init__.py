"""From files, folders and hubs to rows."""
