"""Object references in resources: freed with the record, lost with their owner, moved to the object store if large."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray._private.internal_api import memory_summary

import raystore as rs
from raystore.types.contract import ObjectResource
from tests.conftest import MakeRayStore
from tests.helpers import claim, present, until

MIB = 2**20


def is_referred_to(name: str) -> bool:
    """Whether any process refers to an object, by Ray's table of references."""
    address = ray.get_runtime_context().gcs_address
    return name in memory_summary(address=address, stats_only=False)


def weights_of(update: rs.ResourcesUpdate | None) -> ObjectResource:
    """The only resource of an update, which is an object."""
    (resource,) = present(update).resources.values()
    assert isinstance(resource, ObjectResource)
    return resource


async def test_a_reference_is_freed_with_its_resource(make_ray_store: MakeRayStore) -> None:
    """A 50 MiB object that a resource refers to goes when a newer version replaces it and nobody uses it."""
    store = make_ray_store()
    ref = ray.put(np.zeros(50 * MIB, dtype=np.uint8))
    name = ref.hex()
    await store.update_resources("weights", {"w": ObjectResource(value=ref)}, policy_version=1)
    rollout = await claim(store)
    await store.update_resources("weights", {"w": ObjectResource(value=1)}, policy_version=2)
    del ref
    old = await store.get_resources_by_id("weights", version=1)
    assert weights_of(old).get().nbytes == 50 * MIB
    del old
    assert is_referred_to(name)
    await store.update_attempt(rollout.rollout_id, "latest", status="succeeded")

    async def freed() -> bool:
        return not is_referred_to(name)

    await until(freed)


async def test_a_large_value_moves_to_the_object_store(make_ray_store: MakeRayStore) -> None:
    """The store holds a reference; get() gives the object, in another process too."""
    store = make_ray_store()
    weights = np.arange(100_000, dtype=np.float64)
    await store.add_resources({"w": ObjectResource(value=weights)})
    assert (await store.statistics())["payload_bytes"] < 10_000

    def read(handle: Any) -> float:
        update = rs.RayLightningStore(handle).sync.get_latest_resources()
        return float(weights_of(update).get().sum())

    assert await ray.remote(num_cpus=0)(read).remote(store.actor) == weights.sum()


async def test_a_dead_owner_gives_payload_lost(make_ray_store: MakeRayStore) -> None:
    """An object whose owner died raises PayloadLostError, which says what to do."""
    store = make_ray_store()

    class Publisher:
        def publish(self, handle: Any) -> None:
            value = np.zeros(MIB, dtype=np.uint8)
            rs.RayLightningStore(handle).sync.add_resources({"w": ObjectResource(value=value)})

    publisher = ray.remote(num_cpus=0)(Publisher).remote()
    await publisher.publish.remote(store.actor)
    ray.kill(publisher)

    async def lost() -> str:
        update = await store.get_latest_resources()
        try:
            weights_of(update).get(timeout=1)
        except rs.PayloadLostError as error:
            return str(error)
        except ray.exceptions.GetTimeoutError:
            return ""
        return ""

    assert "owner" in await until(lost)


async def test_references_in_tasks_travel_beside_the_bytes(make_ray_store: MakeRayStore) -> None:
    """A reference in a task arrives as a reference."""
    store = make_ray_store()
    ref = ray.put([1, 2, 3])
    await store.enqueue_rollout({"data": ref, "n": 1})
    claimed = present(await store.dequeue_rollout())
    assert ray.get(claimed.input["data"]) == [1, 2, 3]
    assert (await store.query_rollouts())[0].input["data"] == ref


async def test_objects_go_to_the_journal_and_outlive_their_owner(make_ray_store: MakeRayStore, tmp_path: Path) -> None:
    """Written by who publishes them; read from their file once the owner is dead, by others and after a restart."""
    store = make_ray_store(journal=tmp_path)

    class Publisher:
        def publish(self, handle: Any) -> None:
            value = {"w": np.ones(MIB, dtype=np.uint8)}
            rs.RayLightningStore(handle).sync.update_resources("w", {"w": ObjectResource(value=value)})

    publisher = ray.remote(num_cpus=0)(Publisher).remote()
    await publisher.publish.remote(store.actor)
    (address,) = (path.name for path in (tmp_path / "objects").iterdir() if path.name != "token")
    update = await store.get_latest_resources()
    ray.kill(publisher)
    assert (await weights_of(update).aget())["w"].sum() == MIB
    await store.update_resources("w", {"w": ObjectResource(value=1)})

    async def gone() -> bool:
        await store.statistics()
        return not (tmp_path / "objects" / address).exists()

    await until(gone)


async def test_a_client_that_does_not_see_the_journal_uses_the_store(
    make_ray_store: MakeRayStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces go through the actor, both ways; what is too large is told once, and works as long as its owner lives."""
    monkeypatch.setattr("raystore.values.objects.Origin.files", lambda origin: None)
    monkeypatch.setattr("raystore.values.objects.PIECE_BYTES", 300_000)
    monkeypatch.setattr("raystore.remote.store.PIECE_BYTES", 300_000)
    store = make_ray_store(journal=tmp_path, journal_object_bytes=MIB)
    await store.update_resources("w", {"w": ObjectResource(value=np.arange(MIB, dtype=np.uint8))})
    source = present(weights_of(await store.get_latest_resources()).source)
    assert (source.read("asked") == np.arange(MIB, dtype=np.uint8)).all()
    assert len(list((tmp_path / "objects").iterdir())) == 2  # the object, and the token


async def test_a_large_object_is_said_not_to_survive(
    make_ray_store: MakeRayStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, with its size, the bound, and what to do; and the value is there."""
    store = make_ray_store(journal=tmp_path, journal_object_bytes=MIB // 2)
    for _ in range(2):
        await store.update_resources("w", {"w": ObjectResource(value=np.ones(MIB, dtype=np.uint8))})
    told = [record.getMessage() for record in caplog.records if "journal_object_bytes" in record.getMessage()]
    assert len(told) == 1 and str(MIB) in told[0] and str(MIB // 2) in told[0]
    assert weights_of(await store.get_latest_resources()).get().sum() == MIB


async def test_the_store_is_given_references_again(make_ray_store: MakeRayStore, tmp_path: Path) -> None:
    """A store that is killed has the objects of a living publisher again, and tells it when they are freed."""
    store = make_ray_store(journal=tmp_path, journal_object_bytes=0)
    await store.update_resources("w", {"w": ObjectResource(value=np.ones(MIB, dtype=np.uint8))})
    held = store._session().state.held
    assert len(held) == 1
    os.kill((await store.actor.describe.remote())["pid"], signal.SIGKILL)
    rollout = await store.enqueue_rollout("x")
    assert present(await store.dequeue_rollout(timeout=30)).rollout_id == rollout.rollout_id
    resource = weights_of(await store.get_resources_by_id("w"))
    assert isinstance(resource.value, ray.ObjectRef) and resource.get().sum() == MIB
    await store.update_attempt(rollout.rollout_id, "latest", status="succeeded")
    await store.update_resources("w", {})

    async def let_go() -> bool:
        return not len(held)

    await until(let_go)
