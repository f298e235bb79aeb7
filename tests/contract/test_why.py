"""Why nothing goes on, asked of a store: the binding constraint first, and the errors for what is unknown."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import raystore as rs
from raystore.core.findings import KINDS
from tests.helpers import AnyStore, make_span, present, until


async def why(store: AnyStore, **whose: Any) -> rs.Finding:
    """What binds."""
    return (await store.why(**whose))[0]


async def test_it_follows_what_happens(store: AnyStore) -> None:
    """Nothing to do, nobody to do it, a runner at work on it, an end."""
    assert (await why(store)).kind == "no_tasks"
    made = await store.enqueue_rollout("x", queue="maht")
    assert await store.dequeue_rollout(queues=["math"]) is None
    found = await why(store)
    assert found.kind == "unserved_queue" and "did you mean 'math'?" in found.text
    assert "RunnerPool(store, agent, queues=['maht'])" in found.remedy
    assert found.evidence["queue"] == "maht" and found.evidence["rollouts"] == 1
    claimed = present(await store.dequeue_rollout("worker-1", queues=["maht"]))
    await store.testing.tick(312)
    found = await why(store)
    assert found.kind == "all_claimed" and made.rollout_id in found.text and "on worker worker-1" in found.text
    assert found.evidence["seconds"] == pytest.approx(312, abs=5)
    assert (await why(store, rollout_id=made.rollout_id)).kind == "rollout_runs"
    await store.add_span(make_span(claimed, 1, name="tool.search"))
    assert "'tool.search'" in (await why(store, rollout_id=made.rollout_id)).text
    await store.update_attempt(made.rollout_id, claimed.attempt.attempt_id, status="succeeded")
    found = await why(store, rollout_id=made.rollout_id)
    assert found.kind == "rollout_finished" and "succeeded, after 1 attempt, the last with outcome ok" in found.text
    assert (await why(store)).kind == "no_tasks" and all(one.kind in KINDS for one in await store.why())


async def test_a_group_and_a_consumer(store: AnyStore) -> None:
    """What a trainer waits for, while it waits; what it holds, once it has it."""
    made = await store.enqueue_group("prompt", 2, group_id="g")
    running = await store.dequeue_many_rollouts(limit=2)
    taking = asyncio.ensure_future(store.take_groups(1, consumer="train", timeout=600))

    async def is_parked() -> bool:
        return bool((await store.statistics())["waiters"] == 1)

    await until(is_parked)
    first, last = running
    await store.update_attempt(first.rollout_id, first.attempt.attempt_id, status="succeeded")
    for whose in ({"group_id": "g"}, {"consumer": "train"}, {}):
        found = await why(store, **whose)
        assert found.kind == "group_waits", found
        assert f"Group g has 1 of 2, and waits for rollout {last.rollout_id}" in found.text
    await store.update_attempt(last.rollout_id, last.attempt.attempt_id, status="succeeded")
    batch = await taking
    assert {one.rollout_id for one in batch.rollouts} == {one.rollout_id for one in made}
    assert (await why(store, group_id="g")).kind == "group_ended"
    found = await why(store, consumer="train")
    assert found.kind == "batch_held" and "batch 1 is held for" in found.text
    await store.ack(batch, step=1)
    assert (await why(store, consumer="train")).kind == "no_tasks"


async def test_what_is_unknown_is_refused(store: AnyStore) -> None:
    """With the errors that there are for it."""
    with pytest.raises(rs.RolloutNotFoundError, match="nope"):
        await store.why(rollout_id="nope")
    with pytest.raises(rs.InvalidValueError, match="group_id='nope'"):
        await store.why(group_id="nope")
    with pytest.raises(rs.InvalidValueError, match="consumer='nope'.*there are none"):
        await store.why(consumer="nope")
    with pytest.raises(rs.InvalidValueError, match="ask for one at a time"):
        await store.why(rollout_id="a", consumer="b")
    with pytest.raises(rs.InvalidValueError, match="group_id="):
        await store.why(group_id="a\nb")
    with pytest.raises(TypeError, match="why"):
        await store.why("nope")  # type: ignore[call-arg]


async def test_texts_of_users_are_shown_plainly(store: AnyStore) -> None:
    """Errors and names of spans with escapes do nothing to a terminal."""
    made = await store.enqueue_rollout("x")
    claimed = present(await store.dequeue_rollout())
    await store.add_span(make_span(claimed, 1, name="evil\x1b[2Jname\r\n\u202e"))
    found = await why(store, rollout_id=made.rollout_id)
    assert "'evil\\x1b[2Jname\\r\\n\\u202e'" in found.text and found.text.isprintable()
    ids = (made.rollout_id, claimed.attempt.attempt_id)
    await store.finish_attempt(*ids, [], "failed", outcome="agent_error", error="Traceback\nBoom: \x1b]0;\x07 \x9b1m")
    found = await why(store, rollout_id=made.rollout_id)
    assert "Boom: \\x1b]0;\\x07 \\x9b1m" in found.text and found.text.isprintable()
    assert store.sync.why(rollout_id=made.rollout_id)[0].kind == "rollout_finished"
