"""What a store tells people in its log of its own accord.

Not here: counters (`statistics`), errors.
"""

from __future__ import annotations

import logging

from raystore.core.resources import OBJECT_IDS_WARNED
from raystore.core.state import Pass

logger = logging.getLogger("raystore.store")


def eviction(done: Pass, seconds: float) -> None:
    """One line for each pass; a warning if finished rollouts lost spans that nobody had read."""
    level = logging.WARNING if done.unread else logging.INFO
    unread = f"; {len(done.unread)} finished rollouts had not been read: {done.unread[:3]}" if done.unread else ""
    logger.log(
        level, "Evicted %d spans (%d bytes) of %d rollouts in %.4f s%s",
        done.spans, done.bytes, len(done.rollout_ids), seconds, unread,
    )  # fmt: skip


class ObjectIds:
    """Warns once about many ids that hold objects: likely a leak of weights."""

    def __init__(self) -> None:
        self._warned = False

    def look(self, count: int) -> None:
        """Look at how many ids hold objects now."""
        if count > OBJECT_IDS_WARNED and not self._warned:
            self._warned = True
            logger.warning(
                "%d resources ids hold objects, and none of them is freed while its id stays. Publish new weights with "
                "update_resources() under one id, or start the store with keep_resources=N",
                count,
            )
