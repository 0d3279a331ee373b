"""The charts of an arena run as one self-contained interactive page."""
