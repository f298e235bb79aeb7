"""A selection report beside evaluations: what is measured is no part of what was started to train on."""

from __future__ import annotations

from tests.feed.conftest import RIGHT, running, trained
from tests.helpers import AnyStore


async def test_samples_of_evaluations_are_in_no_report(store: AnyStore) -> None:
    """Neither in that of a feed, nor in that of another consumer, whatever it asks for."""
    feed = store.feed("train", list(range(4)), **RIGHT)
    async with running(store, lambda rollout: 1.0):
        await store.take(1, consumer="other", mode="val")
        await trained(feed)
        await (await feed.evaluate([1, 2, 3], samples=2)).result(timeout=30)
        await store.wait_for_rollout((await store.enqueue_rollout("mine", mode="val")).rollout_id)
    assert (await store.selection_report("train")).started == 8
    assert (await store.selection_report("other")).started == 1
    await feed.close()
