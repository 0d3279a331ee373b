"""The one error of this package."""

from __future__ import annotations


class DataError(ValueError):
    """Data that training cannot use; the message says what is wrong, what was found and what to do."""
