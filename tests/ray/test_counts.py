"""What the data plane costs, in counts: calls, bytes, parked calls. What is timed stands in `benchmarks/`."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import msgpack
import pytest
import ray

import raystore as rs
from raystore.core.spans import SPAN_OVERHEAD_BYTES
from raystore.remote.session import ClientSession
from raystore.types.contract import EnqueueRolloutRequest, Span
from raystore.wire import frames
from tests.conftest import MakeMemoryStore, MakeRayStore
from tests.helpers import make_span, until
from tests.support import shapes


async def calls_of(store: rs.RayLightningStore, shape: str, workers: int, rollouts: int) -> float:
    """Actor calls for each of so many rollouts of a shape."""
    await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=number) for number in range(rollouts)])
    before = await store.statistics()
    await shapes.work(store, shape, shapes.desks(Span, shape, workers), rollouts)
    after = await store.statistics()
    assert after["rollouts_by_status"] == {"succeeded": rollouts}
    return (after["actor_calls"] - before["actor_calls"] - 1) / rollouts


async def test_a_sequential_runner_makes_two_calls_for_a_rollout(make_ray_store: MakeRayStore) -> None:
    """One for the claim, one for the spans, the status and the acknowledgement."""
    assert await calls_of(make_ray_store(), "gathered", 1, 50) <= 2.05  # a listen call may end in between


async def test_concurrent_runners_share_calls(make_ray_store: MakeRayStore) -> None:
    """64 coroutines, each awaiting every one of its 10 operations: about 30 operations travel together."""
    assert await calls_of(make_ray_store(), "lifecycle", 64, 640) <= 0.5


async def test_few_coroutines_share_calls(make_ray_store: MakeRayStore) -> None:
    """A batch that is small waits for the one under way: 16 coroutines fill one, not two halves of one."""
    assert await calls_of(make_ray_store(), "lifecycle", 16, 160) <= 1.0


async def test_bytes_of_a_span(make_memory_store: MakeMemoryStore) -> None:
    """On the wire a span is its attributes and its index, and little else; stored, what is accounted beside them."""
    store = make_memory_store()
    rollout = await store.start_rollout("task")
    (desk,) = shapes.desks(Span, "lifecycle", 1)
    span = desk.address(rollout)[0]
    attributes = len(msgpack.packb(span.attributes))
    index = len(span.span_id) + len(span.trace_id) + len(span.name)
    row = store._encoder.span(span)
    names = {"rollout_id": span.rollout_id, "attempt_id": span.attempt_id}
    frame = frames.pack_operation("add_spans", {**names, "spans": [row]}).frame
    assert len(frame) <= attributes + index + 150
    await store.add_span(span)
    before = (await store.statistics())["total_span_bytes"]
    await store.add_span(span.model_copy(update={"span_id": "another"}))
    assert (await store.statistics())["total_span_bytes"] - before <= attributes + index + SPAN_OVERHEAD_BYTES + 100


def parked_calls(actor: Any) -> int:
    """In the actor: how many calls have not returned; Ray makes a task of each."""
    own = {"Lifelines._watch", "Exporter._run"}  # tasks of the actor itself
    tasks = asyncio.all_tasks(actor._service._alarm._loop)
    running = [getattr(task.get_coro(), "__qualname__", "") for task in tasks]
    assert own <= set(running)
    return sum(name not in own for name in running)


async def test_a_process_parks_one_call(make_ray_store: MakeRayStore) -> None:
    """However many of its coroutines wait, for work, rollouts, completions or changes."""
    store = make_ray_store()
    rollouts = await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=n, queue="idle") for n in range(100)])
    waiting = [asyncio.create_task(store.wait_for_rollout(rollout.rollout_id)) for rollout in rollouts]
    waiting += [asyncio.create_task(store.dequeue_rollout(timeout=30)) for _ in range(100)]
    waiting += [asyncio.create_task(store.completed(timeout=30)), asyncio.create_task(store.changes(10**6, timeout=30))]

    async def parked() -> bool:
        return (await store.statistics())["waiters"] == len(waiting)

    await until(parked)
    assert ray.get(store.actor.__ray_call__.remote(parked_calls)) == 1
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_state_costs_its_bytes_once_each_way(
    make_ray_store: MakeRayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is sent when it is saved, and read by the one attempt that goes on from it; claims do not carry it."""
    size, count = 1024 * 1024, 5
    store = make_ray_store()
    travelled = 0
    ask, unpack = ClientSession._ask, frames.unpack_answer

    def counted_ask(session: Any, method: str, then: Any, *parts: Any, **more: Any) -> Any:
        nonlocal travelled
        travelled += sum(len(part) for part in parts if isinstance(part, bytes))
        return ask(session, method, then, *parts, **more)

    def counted_answer(answer: Any) -> Any:
        nonlocal travelled
        travelled += len(answer if isinstance(answer, bytes) else answer[0])
        return unpack(answer)

    monkeypatch.setattr(ClientSession, "_ask", counted_ask)
    monkeypatch.setattr(frames, "unpack_answer", counted_answer)
    await store.enqueue_rollout("long")
    for number in range(count):
        rollout = await store.dequeue_rollout("w")
        assert rollout is not None
        ids = rollout.rollout_id, rollout.attempt.attempt_id
        if number:
            assert len(await store.get_saved_state(*ids)) == size
        await store.save_state(*ids, os.urandom(size), [make_span(rollout, 0)])
        await store.finish_attempt(*ids, [], "unresponsive", outcome="withdrawn")
    assert travelled <= 2 * count * size  # the last one was saved, and not gone on from
    assert travelled - (2 * count - 1) * size <= 20_000  # whatever else was said
