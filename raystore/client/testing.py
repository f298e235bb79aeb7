"""What tests may do to a store and production code must not: move its clock.

Not here: fixtures; the repository's own tests have theirs.
"""

from __future__ import annotations

from raystore.client.pending import Call
from raystore.client.transport import Transport


class Testing:
    """`store.testing`, of use with `clock="manual"`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def tick(self, seconds: float, *, sessions: bool = False) -> Call:
        """Let the store's time pass by `seconds`; for claims and sessions too, if asked.

        Takes effect at its place among the operations of this process; may be awaited. Raises `InvalidValueError` on
        a store whose clock is not manual.
        """
        return self._transport.post("tick", {"seconds": float(seconds), "sessions": sessions})
