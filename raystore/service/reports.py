"""What a store tells people in its log of its own accord.

Not here: counters (`statistics`), errors.
"""

from __future__ import annotations

import logging

from raystore.core import wanted
from raystore.core.state import Pass, State
from raystore.errors.words import meant

logger: logging.Logger = logging.getLogger("raystore.store")


def eviction(done: Pass, seconds: float) -> None:
    """One line for each pass; a warning if finished rollouts lost spans that nobody had read."""
    level = logging.WARNING if done.unread else logging.INFO
    unread = f"; {len(done.unread)} finished rollouts had not been read: {done.unread[:3]}" if done.unread else ""
    logger.log(
        level, "Evicted %d spans (%d bytes) of %d rollouts in %.4f s%s",
        done.spans, done.bytes, len(done.rollout_ids), seconds, unread,
    )  # fmt: skip


def memory_full(state: State) -> None:
    """Once for each pause: who is in the way, and what helps."""
    if not state.memory_full:
        logger.info("Hands out work again: %d bytes are in use", state.total_bytes)
        return
    whose = [
        f"consumer {name!r} awaits {awaited} rollouts and holds {held}"
        for name, awaited, held in wanted.in_the_way(state)
    ]
    if state.waits_for is None:
        whose = []
    logger.warning(
        "Memory is full (%d bytes, threshold %d) and nothing more may be evicted: no work is handed out until %d bytes "
        "are in use. %s",
        state.total_bytes, state.settings.eviction_bytes, state.settings.safe_bytes,
        "Call release() for what nobody needs any more (on_memory_full='pause')." if not whose else
        f"In the way: {'; '.join(whose[:5])}. What is taken, acknowledged and covered by a checkpoint is freed; say "
        f"forget_consumer({state.waits_for!r}) if it will not come again. A journal keeps spans on disk instead.",
    )  # fmt: skip


def unserved(queue: str, waiting: int, seconds: float, served: list[str]) -> None:
    """A queue in which rollouts wait and of which nobody has asked for work for a while: a misspelt name, perhaps."""
    if served:
        others = ", ".join(repr(name) for name in sorted(served)[:5])
        hint = f"Served are {others}{', ...' if len(served) > 5 else ''}{meant(queue, served) or '.'}"
    else:
        hint = "No queue is served: the runners are not ready yet, have ended, or were never started."
    logger.warning(
        "Rollouts wait in queue %r (%d), and no process has asked for work of it for %.0f s. %s "
        "Serve it with RunnerPool(store, agent, queues=[%r]), or cancel_rollouts() what was put there by mistake.",
        queue, waiting, seconds, hint, queue,
    )  # fmt: skip


class ObjectIds:
    """Warns once about many ids that hold objects: likely a leak of weights."""

    def __init__(self) -> None:
        self._warned = False

    def warn(self, count: int) -> None:
        """So many ids hold objects now, which is more than usual."""
        if not self._warned:
            self._warned = True
            logger.warning(
                "%d resources ids hold objects, and none of them is freed while its id stays. Publish new weights with "
                "update_resources() under one id, or start the store with keep_resources=N",
                count,
            )
