"""Object references in resources: freed with the record, lost with their owner, moved to the object store if large."""

from __future__ import annotations

import numpy as np
import ray
from ray._private.internal_api import memory_summary

import raystore as rs
from raystore.types import ObjectResource
from tests.helpers import claim, until

MIB = 2**20


def is_referred_to(name):
    """Whether any process refers to an object, by Ray's table of references."""
    address = ray.get_runtime_context().gcs_address
    return name in memory_summary(address=address, stats_only=False)


async def test_a_reference_is_freed_with_its_resource(make_ray_store):
    """A 50 MiB object that a resource refers to goes when a newer version replaces it and nobody uses it."""
    store = make_ray_store()
    ref = ray.put(np.zeros(50 * MIB, dtype=np.uint8))
    name = ref.hex()
    await store.update_resources("weights", {"w": ObjectResource(value=ref)}, policy_version=1)
    rollout = await claim(store)
    await store.update_resources("weights", {"w": ObjectResource(value=1)}, policy_version=2)
    del ref
    old = await store.get_resources_by_id("weights", version=1)
    assert old.resources["w"].get().nbytes == 50 * MIB
    del old
    assert is_referred_to(name)
    await store.update_attempt(rollout.rollout_id, "latest", status="succeeded")

    async def freed():
        return not is_referred_to(name)

    await until(freed)


async def test_a_large_value_moves_to_the_object_store(make_ray_store):
    """The store holds a reference; get() gives the object, in another process too."""
    store = make_ray_store()
    weights = np.arange(100_000, dtype=np.float64)
    await store.add_resources({"w": ObjectResource(value=weights)})
    assert (await store.statistics())["payload_bytes"] < 10_000

    @ray.remote(num_cpus=0)
    def read(handle):
        update = rs.RayLightningStore(handle).sync.get_latest_resources()
        return float(update.resources["w"].get().sum())

    assert await read.remote(store.actor) == weights.sum()


async def test_a_dead_owner_gives_payload_lost(make_ray_store):
    """An object whose owner died raises PayloadLostError, which says what to do."""
    store = make_ray_store()

    @ray.remote(num_cpus=0)
    class Publisher:
        def publish(self, handle):
            value = np.zeros(MIB, dtype=np.uint8)
            rs.RayLightningStore(handle).sync.add_resources({"w": ObjectResource(value=value)})

    publisher = Publisher.remote()
    await publisher.publish.remote(store.actor)
    ray.kill(publisher)

    async def lost():
        update = await store.get_latest_resources()
        try:
            update.resources["w"].get(timeout=1)
        except rs.PayloadLostError as error:
            return str(error)
        except ray.exceptions.GetTimeoutError:
            return ""
        return ""

    assert "owner" in await until(lost)


async def test_references_in_tasks_travel_beside_the_bytes(make_ray_store):
    """A reference in a task arrives as a reference."""
    store = make_ray_store()
    ref = ray.put([1, 2, 3])
    await store.enqueue_rollout({"data": ref, "n": 1})
    claimed = await store.dequeue_rollout()
    assert ray.get(claimed.input["data"]) == [1, 2, 3]
    assert (await store.query_rollouts())[0].input["data"] == ref
