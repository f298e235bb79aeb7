"""Handing on what the store says of attempts that this process holds: cancelled, superseded, timed out.

Not here: what a notice means for an agent (`raystore.runner`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

logger = logging.getLogger("raystore")

Handler = Callable[[str, str, str], None]  #: kind, rollout id, attempt id


class Notices:
    """The handlers of one process; may be called from any thread, without a lock held."""

    def __init__(self) -> None:
        self._handlers: list[Handler] = []

    def listen(self, handler: Handler) -> Callable[[], None]:
        """Call a handler for each notice from now on; how to stop that."""
        self._handlers.append(handler)
        return lambda: self._handlers.remove(handler)

    def hand_out(self, notices: Iterable[Sequence[str]]) -> None:
        """Call every handler for every notice."""
        for notice in notices:
            for handler in list(self._handlers):
                try:
                    handler(*notice)
                except Exception:  # somebody else's code, which must not hold up the session
                    logger.exception("A handler of notices failed")
