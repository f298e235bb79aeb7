"""Rows 6 and 18: many rollouts at once, and rollouts as a queue."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import ExitStack, closing

from ray.util.queue import Queue

import raystore as rs
from benchmarks.parties import Naive
from benchmarks.scope import Scope
from benchmarks.table import Line, alternate, at_least, compare
from tests.support import shapes


async def bulk(scope: Scope) -> list[Line]:
    """Row 6."""
    many, few = 10_000, scope.amount(600)
    with ExitStack() as stack:
        ours, naive = stack.enter_context(rs.start()), stack.enter_context(closing(Naive()))

        async def mine() -> float:
            requests = [rs.EnqueueRolloutRequest(input={"task": number}) for number in range(many)]
            started = time.perf_counter()
            await ours.enqueue_many_rollouts(requests)
            claimed = await ours.dequeue_many_rollouts(limit=many, worker_id="w")
            seconds = time.perf_counter() - started
            if len(claimed) != many:
                raise RuntimeError(f"{len(claimed)} of {many} rollouts were claimed")
            await ours.delete_rollouts([rollout.rollout_id for rollout in claimed])
            return many / seconds

        async def theirs() -> float:
            started = time.perf_counter()
            for number in range(few):
                await naive.enqueue_rollout({"task": number})
            for _ in range(few):
                await naive.dequeue_rollout("w")
            return few / (time.perf_counter() - started)

        samples = await alternate(scope.rounds, {"ours": mine, "naive": theirs})
    did = f"enqueue and claim of {many} rollouts by one call each; naive: {few} awaited one after the other"
    return [compare(6, "bulk enqueue and claim", samples, "naive", at_least(30), unit="rollouts/s", did=did)]


async def as_queue(scope: Scope) -> list[Line]:
    """Row 18."""
    callers, each, many = 64, scope.amount(32), 5000
    task = shapes.words(random.Random(1), 1000)
    with ExitStack() as stack:
        store = stack.enter_context(rs.start())
        queue = Queue(actor_options={"num_cpus": 0})
        stack.callback(queue.shutdown, force=True)

        async def over(one: object) -> float:
            async def caller() -> None:
                for _ in range(each):
                    await one()  # type: ignore[operator]

            started = time.perf_counter()
            await asyncio.gather(*(caller() for _ in range(callers)))
            return callers * each / (time.perf_counter() - started)

        async def mine() -> float:
            async def one() -> None:
                await store.enqueue_rollout(task)
                await store.dequeue_rollout(timeout=10)

            return await over(one)

        async def theirs() -> float:
            async def one() -> None:
                await queue.put_async(task)
                await queue.get_async()

            return await over(one)

        async def mine_in_bulk() -> float:
            requests = [rs.EnqueueRolloutRequest(input=task) for _ in range(many)]
            started = time.perf_counter()
            await store.enqueue_many_rollouts(requests)
            claimed = await store.dequeue_many_rollouts(limit=many)
            seconds = time.perf_counter() - started
            await store.delete_rollouts([rollout.rollout_id for rollout in claimed])
            return many / seconds

        async def theirs_in_bulk() -> float:
            tasks = [task for _ in range(many)]
            started = time.perf_counter()
            queue.put_nowait_batch(tasks)
            queue.get_nowait_batch(many)
            return many / (time.perf_counter() - started)

        single = await alternate(scope.rounds, {"ours": mine, "ray Queue": theirs})
        batch = await alternate(scope.rounds, {"ours": mine_in_bulk, "ray Queue": theirs_in_bulk})
    did = f"{callers} callers, {each} times put and get of a 1 KB task, each awaited"
    did_bulk = f"put and get of {many} tasks of 1 KB by one call each (the queue keeps no id, record or claim)"
    return [
        compare(18, "as a queue", single, "ray Queue", at_least(8), unit="tasks/s", did=did),
        compare(18, "as a queue, bulk", batch, "ray Queue", at_least(0.3), unit="tasks/s", did=did_bulk),
    ]


ROWS = {6: bulk, 18: as_queue}
