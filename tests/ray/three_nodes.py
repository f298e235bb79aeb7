"""Three nodes, of which one is killed in mid-run; a program of its own, since a process has one Ray at a time."""

from __future__ import annotations

import asyncio
import collections
import time
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import raystore as rs
from tests.helpers import QUICK_HEALTH_CHECKS, present

ROLLOUTS = 60


async def agent(task: Any, ctx: rs.Context) -> float:
    """Slow enough to be hit; says where it ran."""
    with ctx.span("begun", node=ray.get_runtime_context().get_node_id()):
        pass  # sent after 0.1 s, so that the store knows that the rollout runs
    await asyncio.sleep(2.0)
    return 1.0


class UsersRunner:
    """A runner as users write it: it is given the store's handle."""

    async def run(self, handle: Any, count: int) -> Any:
        store = rs.RayLightningStore(handle)
        done = []
        for _ in range(count):
            claimed = present(await store.dequeue_rollout("users", timeout=30, queues=("mine",)))
            await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status="succeeded")
            done.append(claimed.rollout_id)
        return ray.get_runtime_context().get_node_id(), done


async def holds_something(store: rs.RayLightningStore, node: Any) -> None:
    """Wait until an agent has begun on a node and goes on; it has most of its two seconds left."""
    async with asyncio.timeout(30):
        while True:
            running = await store.query_rollouts(status_in=["running"])
            spans = await store.query_many_spans([r.rollout_id for r in running])
            begun = [of_one[0] for of_one in spans.values() if of_one and of_one[0].attributes["node"] == node.node_id]
            if any(time.time() - present(span.end_time) < 0.5 for span in begun):
                return
            await asyncio.sleep(0.05)


async def main(cluster: Any, second: Any, third: Any) -> None:
    head = ray.get_runtime_context().get_node_id()
    for _ in range(5):
        with rs.start() as another:
            assert another.info.node == head, "the store is not on the driver's node"
    async with rs.start() as store:
        mine = [r.rollout_id for r in await store.enqueue_group("x", 5, queue="mine")]
        there = NodeAffinitySchedulingStrategy(second.node_id, soft=False)
        runner = ray.remote(UsersRunner).options(scheduling_strategy=there).remote()
        users = runner.run.remote(store.actor, 5)
        made = [r.rollout_id for r in await store.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input=0)] * ROLLOUTS)]
        async with rs.RunnerPool(store, agent, size=5, concurrency=2, flush_seconds=0.1) as pool:
            before = set(pool.worker_ids)
            done = 0
            async for _ in store.as_completed(made):
                done += 1
                if done == 15:
                    break
            await holds_something(store, third)
            await asyncio.to_thread(cluster.remove_node, third, allow_graceful=False)
            finished = await store.wait_for_rollouts(rollout_ids=made, timeout=90)
            replaced = set(pool.worker_ids) - before
        assert (await users) == (second.node_id, mine)
        assert len(finished) == ROLLOUTS and {r.status for r in finished} == {"succeeded"}
        spans = await store.query_many_spans(made)
        nodes = collections.Counter(of_one[0].attributes["node"] for of_one in spans.values())
        assert len(nodes) == 3 and all(len(of_one) == 2 for of_one in spans.values()), spans
        attempts = await asyncio.gather(*(store.query_attempts(rollout_id) for rollout_id in made))
        lost = [a for several in attempts for a in several if a.outcome == "runner_lost"]
        assert lost and replaced, (lost, replaced)
        await store.check()
        print(f"{len(nodes)} nodes, {len(lost)} attempts lost with one, {len(replaced)} runners replaced, nothing lost")


if __name__ == "__main__":
    options = {"num_cpus": 2, "include_dashboard": False, "_system_config": QUICK_HEALTH_CHECKS}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        nodes = [cluster.add_node(num_cpus=4) for _ in range(2)]
        asyncio.run(main(cluster, *nodes))
    finally:
        ray.shutdown()
        cluster.shutdown()
