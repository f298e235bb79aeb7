"""Which process one is in: forks, processes of agents, other clusters, Ray Client."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Coroutine
from typing import Any

import pytest
import ray

import raystore as rs
from raystore.remote.store import _rebuild
from tests.conftest import MakeMemoryStore, MakeRayStore
from tests.helpers import present


def in_child(*functions: Any) -> Any:
    """What functions give in a forked child, or the class of what they raise, each within some seconds."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        seen = []
        for function in functions:
            try:
                seen.append(function())
            except BaseException as error:
                seen.append(type(error).__name__)
        with os.fdopen(writing, "w") as file:
            json.dump(seen, file)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        seen = json.load(file)
    os.waitpid(pid, 0)
    return seen


def test_a_store_in_process_after_a_fork(make_memory_store: MakeMemoryStore) -> None:
    """Used before, it raises at once and is the parent's; not used, each has its own."""
    used, unused = make_memory_store(), make_memory_store()
    made = used.sync.enqueue_rollout("x")

    async def dequeue() -> rs.AttemptedRollout | None:
        return await used.dequeue_rollout()

    def run(coroutine: Coroutine[Any, Any, Any]) -> StopIteration:
        with pytest.raises(StopIteration) as stop:
            coroutine.send(None)
        return stop.value

    seen = in_child(
        lambda: used.sync.statistics() and None,
        lambda: run(dequeue()),
        lambda: used.testing.tick(1) and None,
        used.close,
        lambda: unused.sync.enqueue_rollout("y").input,
        lambda: present(unused.sync.dequeue_rollout()).input,
    )
    assert seen == ["ForkedError", "ForkedError", "ForkedError", None, "y", "y"]
    assert present(used.sync.dequeue_rollout()).rollout_id == made.rollout_id
    assert unused.sync.dequeue_rollout() is None


def test_a_store_on_ray_after_a_fork(make_ray_store: MakeRayStore) -> None:
    """Whatever a child calls raises at once, and says what to do; the parent goes on."""
    store = make_ray_store()
    other = pickle.loads(pickle.dumps(store))
    seen = in_child(
        lambda: store.sync.statistics() and None,
        lambda: other.sync.statistics() and None,
        lambda: rs.connect(store.info.name) and None,
        lambda: rs.stop(store),
        store.close,
    )
    assert seen == ["ForkedError"] * 4 + [None]
    assert store.sync.statistics()["rollouts_by_status"] == {} and "spawn" in str(rs.ForkedError("It"))


FORKS = """
import os, pickle, sys
store = pickle.loads(bytes.fromhex(sys.argv[1]))
pid = os.fork()
if pid == 0:
    print("SEEN", store.sync.enqueue_rollout("of a child").input, flush=True)
    os._exit(0)
os.waitpid(pid, 0)
"""


def test_a_store_that_was_not_used_connects_in_the_child(make_ray_store: MakeRayStore) -> None:
    """To its own cluster, which it was told of, whatever Ray would choose."""
    store = make_ray_store()
    command = [sys.executable, "-c", FORKS, pickle.dumps(store).hex()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert "SEEN of a child" in ran.stdout, ran.stderr
    assert [rollout.input for rollout in store.sync.query_rollouts()] == ["of a child"]


def test_it_has_ended_is_said_of_the_dead_only(make_ray_store: MakeRayStore) -> None:
    """Of a store in another cluster it is said where it is."""
    info = make_ray_store().info
    own, namespace = present(info.name), present(info.namespace)
    here = ray.get_runtime_context().gcs_address
    with pytest.raises(rs.StoreUnavailableError, match="it has ended"):
        _rebuild("no such store", namespace, info.store_id, here).sync.statistics()
    for name in ("no such store", own):
        with pytest.raises(rs.StoreUnavailableError) as raised:
            _rebuild(name, namespace, "another id", "192.0.2.99:6379").sync.statistics()
        assert "has ended" not in str(raised.value)
        assert "192.0.2.99:6379" in str(raised.value) and here in str(raised.value)


async def test_an_agents_process_joins_the_cluster_of_its_runner(make_ray_store: MakeRayStore) -> None:
    """Ray, and a store that it was given, work there."""
    store = make_ray_store()

    def agent(task: Any, ctx: rs.Context) -> None:
        assert ray.get(ray.put(task)) == task
        assert store.sync.get_rollout_by_id(ctx.rollout.rollout_id).input == task
        with ctx.span("where", cluster=ray.get_runtime_context().gcs_address):
            pass

    made = await store.enqueue_rollout("x")
    async with rs.RunnerPool(store, agent, size=1, isolation="process"):
        await store.wait_for_rollout(made.rollout_id, timeout=60)
    (span,) = await store.query_spans(made.rollout_id)
    assert span.attributes["cluster"] == ray.get_runtime_context().gcs_address


NO_RAY = """
import raystore as rs
def agent(task, ctx):
    import ray
    ray.put(1)
with rs.InMemoryLightningStore() as store:
    made = store.sync.enqueue_rollout("x")
    with rs.RunnerPool(store, agent, size=1, isolation="process"):
        store.sync.wait_for_rollouts(rollout_ids=[made.rollout_id], timeout=60)
    print("SEEN", store.sync.get_latest_attempt(made.rollout_id).error.splitlines()[-1])
"""


def test_no_cluster_is_started_unasked_in_an_agents_process() -> None:
    """Where its runner has none: Ray says that it was not started."""
    ran = subprocess.run([sys.executable, "-c", NO_RAY], capture_output=True, text=True, timeout=90)
    assert "SEEN" in ran.stdout and "ray.init()" in ran.stdout, (ran.stdout, ran.stderr)


def test_ray_client_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an argument, by RAY_ADDRESS, and where it is connected already."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for address in ("ray://head:10001", None):
        monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
        with pytest.raises(rs.RayClientError, match=r"ray://head:10001.*ray job submit"):
            rs.start(address=address)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray.util.client.ray, "is_connected", lambda: True)
    with pytest.raises(rs.RayClientError, match="Ray Client"):
        rs.connect("any")
