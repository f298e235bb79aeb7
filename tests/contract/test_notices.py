"""What becomes of an attempt is told to whoever holds it, and a handler may use the store."""

from __future__ import annotations

from typing import Any

from tests.helpers import AnyStore, claim, present, until


async def test_a_handler_may_use_the_store(store: AnyStore) -> None:
    """It writes, and brings about more notices: all are told, in the order in which they happened, one at a time."""
    rollouts = [await claim(store) for _ in range(6)]
    told, inside = [], []

    def handler(kind: Any, rollout_id: str, attempt_id: str) -> None:
        inside.append(1)
        assert len(inside) == 1
        place = [rollout.rollout_id for rollout in rollouts].index(rollout_id)
        told.append((kind, place))
        store.sync.update_worker("w", {"told": place})
        if place + 1 < len(rollouts):
            store.sync.cancel_rollouts([rollouts[place + 1].rollout_id])
        inside.pop()

    stop = store.listen_for_notices(handler)
    await store.cancel_rollouts([rollouts[0].rollout_id])

    async def all_told() -> bool:
        return len(told) == len(rollouts)

    await until(all_told)
    stop()
    assert told == [("cancelled", number) for number in range(6)]
    assert present(await store.get_worker_by_id("w")).heartbeat_stats == {"told": 5}
    assert {r.status for r in await store.query_rollouts()} == {"cancelled"}
    await store.check()


async def test_a_handler_that_fails_disturbs_nobody(store: AnyStore) -> None:
    """Its exception is its own; the others are told."""
    rollout = await claim(store)
    told = []

    def fail(*notice: Any) -> None:
        raise RuntimeError("a handler's bug")

    store.listen_for_notices(fail)
    store.listen_for_notices(lambda *notice: told.append(notice))
    await store.cancel_rollouts([rollout.rollout_id])

    async def notified() -> list[Any]:
        return told

    assert await until(notified) == [("cancelled", rollout.rollout_id, rollout.attempt.attempt_id)]
    await store.enqueue_rollout("still works")
