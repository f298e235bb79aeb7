"""The root of all errors.

Not here: any error that is raised.
"""

from __future__ import annotations


class StoreError(Exception):
    """The root of raystore's errors."""
