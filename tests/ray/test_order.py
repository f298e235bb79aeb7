"""Operations of one caller take effect in the order in which they were issued, awaited or not."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable
from typing import Any

import pytest

import raystore as rs
from tests.conftest import MakeRayStore
from tests.helpers import claim, make_span

RUNS = [pytest.param(run, marks=[] if run < 2 else pytest.mark.long) for run in range(20)]


@pytest.mark.parametrize("run", RUNS)
async def test_unawaited_operations_of_mixed_sizes_keep_their_order(make_ray_store: MakeRayStore, run: Any) -> None:
    """2,000 operations, from a few bytes to more than Ray carries inline, gathered without awaiting any."""
    store = make_ray_store()
    rng = random.Random(run)
    rollout = await claim(store)
    operations: list[Awaitable[object]] = []
    inputs, names = [], []
    for number in range(2000):
        size = rng.choice([10, 100, 1000, 20_000, 150_000] if number % 20 == 0 else [10, 100, 1000])
        if number % 2:
            inputs.append((number, size))
            operations.append(store.enqueue_rollout({"number": number, "text": "x" * size}))
        else:
            names.append(f"span {number}")
            span = make_span(rollout, name=names[-1], attributes={"text": "x" * size})
            operations.append(store.add_unnumbered_spans([span]))
    await asyncio.gather(*operations)
    made = [r for r in await store.query_rollouts() if r.rollout_id != rollout.rollout_id]
    assert [(r.input["number"], len(r.input["text"])) for r in made] == inputs
    assert [span.name for span in await store.query_spans(rollout.rollout_id)] == names
    found = await store.statistics()
    assert found["operations"] > 2000 > 10 * found["actor_calls"]


async def test_spans_and_status_gathered_are_one_call(make_ray_store: MakeRayStore) -> None:
    """Eight spans and the final status, un-awaited and gathered, are one actor call and correct."""
    store = make_ray_store()
    rollout = await claim(store)
    await asyncio.sleep(1.0)  # the claim is acknowledged by a call of its own by now
    before = (await store.statistics())["actor_calls"]
    spans = [store.add_span(make_span(rollout, number)) for number in range(1, 9)]
    await asyncio.gather(*spans, store.update_attempt(rollout.rollout_id, "latest", status="succeeded"))
    after = await store.statistics()
    assert after["actor_calls"] - before == 2  # the call, and the statistics
    assert after["total_spans"] == 8 and after["rollouts_by_status"] == {"succeeded": 1}


async def test_an_operation_that_fails_does_not_disturb_the_others(make_ray_store: MakeRayStore) -> None:
    """Each operation of a batch has its own answer; errors are clean local exceptions."""
    store = make_ray_store()
    rollout = await claim(store)
    answers = await asyncio.gather(
        store.add_span(make_span(rollout, 1)),
        store.add_span(make_span("nope", attempt_id="at")),
        store.add_span(make_span(rollout, 2)),
        return_exceptions=True,
    )
    assert [type(answer).__name__ for answer in answers] == ["Span", "RolloutNotFoundError", "Span"]
    refused = answers[1]
    assert isinstance(refused, rs.RolloutNotFoundError)
    assert refused.__cause__ is None and "Traceback" not in str(refused)


async def test_an_operation_cancelled_before_it_leaves_is_dropped(make_ray_store: MakeRayStore) -> None:
    """Cancelled in the tick in which it was issued, an operation never reaches the store."""
    store = make_ray_store()
    await store.enqueue_rollout("first")
    task = asyncio.ensure_future(store.enqueue_rollout("dropped"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [r.input for r in await store.query_rollouts()] == ["first"]


async def test_long_answers_come_in_parts(make_ray_store: MakeRayStore) -> None:
    """More than 8 MiB of spans are read in parts, unseen, and are complete."""
    store = make_ray_store()
    rollout = await claim(store)
    spans = [make_span(rollout, number, attributes={"text": "x" * 200_000}) for number in range(1, 101)]
    await store.add_many_spans(spans)
    before = (await store.statistics())["actor_calls"]
    assert await store.query_spans(rollout.rollout_id) == spans
    assert (await store.statistics())["actor_calls"] - before >= 4
