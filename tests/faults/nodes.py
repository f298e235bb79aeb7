"""A store on a node that is killed, over and over; a program of its own, since a process has one Ray at a time.

`python -m tests.faults.nodes JOURNAL KILLS`; the last line it says is JSON.
"""

from __future__ import annotations

import asyncio
import functools
import json
import sys
import time
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import raystore as rs
from tests.channel import take_stdout
from tests.faults.processes import describe, later
from tests.helpers import QUICK_HEALTH_CHECKS, until


async def main(cluster: Cluster, journal: str, kills: int) -> dict[str, Any]:
    made, lost, slowest = [], 0, 0.0
    for number in range(kills):
        node = cluster.add_node(num_cpus=2)
        there = NodeAffinitySchedulingStrategy(node.node_id, soft=True)
        store = rs.start(f"s{number}", journal=journal, resume="must" if number else "auto",
                         actor_options={"scheduling_strategy": there})  # fmt: skip
        assert store.info.node == node.node_id, "the store is not where it was asked to be"
        made += [(await store.enqueue_rollout(i)).rollout_id for i in range(50)]
        before = (await describe(store))["epoch"]
        killed = time.monotonic()
        await asyncio.to_thread(cluster.remove_node, node, allow_graceful=False)
        await until(functools.partial(later, store, before))
        made.append((await store.enqueue_rollout("after")).rollout_id)
        slowest = max(slowest, time.monotonic() - killed)
        rollouts = {rollout.rollout_id for rollout in await store.query_rollouts()}
        lost += len(set(made) - rollouts)
        rs.stop(store)
        store.close()
    return {"lost": lost, "slowest": slowest, "kills": kills}


if __name__ == "__main__":
    channel = take_stdout()
    options = {"num_cpus": 2, "include_dashboard": False, "_system_config": QUICK_HEALTH_CHECKS}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        cluster.add_node(num_cpus=2)
        found = asyncio.run(main(cluster, sys.argv[1], int(sys.argv[2])))
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps(found), file=channel)
