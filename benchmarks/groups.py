"""Row 26: what it costs to take whole groups, however many others are open."""

from __future__ import annotations

import gc
import time

import raystore as rs
from benchmarks.scope import Scope
from benchmarks.table import Line, alternate, at_most, compare

LARGE, SMALL = 100_000, 100
TAKEN, SIZE = 32, 8  #: groups in a batch, and rollouts in each


async def _filled(groups: int) -> rs.InMemoryLightningStore:
    """A store with so many open groups."""
    store = rs.InMemoryLightningStore()
    await store.take_groups(1, consumer="trainer")
    for first in range(0, groups, 10_000):
        numbers = range(first, min(first + 10_000, groups))
        await store.enqueue_many_groups(
            [rs.EnqueueGroupRequest(input=n, n=2, deadline_seconds=86_400, queue="open") for n in numbers]
        )
    return store


class _Trainer:
    """Takes groups, of which there are as many as it asks for."""

    def __init__(self, store: rs.InMemoryLightningStore) -> None:
        self._store = store
        self._step = 0

    async def take(self) -> float:
        """Microseconds of a take."""
        store = self._store
        requests = [rs.EnqueueGroupRequest(input="task", n=SIZE, min_size=2) for _ in range(TAKEN)]
        made = await store.enqueue_many_groups(requests)
        for group in made:
            for rollout_id in group.members:
                await store.update_rollout(rollout_id, status="succeeded")
        started = time.perf_counter()
        batch = await store.take_groups(TAKEN, consumer="trainer")
        seconds = time.perf_counter() - started
        assert len(batch.groups) == TAKEN
        self._step += 1
        await store.ack(batch, step=self._step)
        await store.checkpoint("trainer", self._step)
        await store.delete_rollouts([rollout.rollout_id for rollout in batch.rollouts])
        return seconds * 1e6


async def takes(scope: Scope) -> list[Line]:
    """Row 26."""
    large = scope.amount(LARGE)
    stores = {"ours": await _filled(large), "small": await _filled(SMALL)}
    gc.collect()
    gc.freeze()
    samples = await alternate(scope.rounds, {name: _Trainer(store).take for name, store in stores.items()})
    gc.unfreeze()
    did = f"take_groups({TAKEN}) of {SIZE} rollouts each, among {large:,} open groups against {SMALL}"
    return [compare(26, "a batch of groups", samples, "small", at_most(2), unit="µs", did=did)]


ROWS = {26: takes}
