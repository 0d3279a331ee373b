"""The charts of an arena run as one interactive page that loads nothing from anywhere."""
