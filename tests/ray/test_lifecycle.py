"""Starting, finding, sharing and ending stores, and what goes wrong with them."""

from __future__ import annotations

import asyncio
import logging
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import ray

import raystore as rs
from raystore.service.service import PROTOCOL
from tests.conftest import MakeRayStore
from tests.helpers import present, until


async def test_names(make_ray_store: MakeRayStore) -> None:
    """Without a name a store gets one of its own; `info` says who it is."""
    a, b = make_ray_store(), make_ray_store()
    assert a.info.name != b.info.name and a.info.store_id != b.info.store_id
    assert (a.info.namespace, a.info.protocol, a.info.capabilities["thread_safe"]) == ("raystore", PROTOCOL, True)
    assert a.info.limits["value_bytes"] == 16 * 2**20
    assert {a.info.name, b.info.name} <= {info.name for info in rs.list_stores()}
    assert present(a.info.name) in repr(a)
    await a.enqueue_rollout("x")
    assert (await b.query_rollouts()).total == 0


async def test_a_name_that_exists(make_ray_store: MakeRayStore) -> None:
    """An error says what exists; attaching works if the configuration is the same, else it says what differs."""
    store = make_ray_store(name="taken", max_queued=5)
    with pytest.raises(rs.StoreExistsError, match=r"'taken' exists already.*rs.connect\('taken'\)"):
        rs.start("taken")
    attached = rs.start("taken", max_queued=5, exist="attach")
    assert attached.info == store.info
    with pytest.raises(rs.StoreExistsError, match="max_queued: 5 there, 6 asked for"):
        rs.start("taken", max_queued=6, exist="attach")
    attached.close()
    await store.enqueue_rollout("still here")
    wrong: Any = "maybe"
    with pytest.raises(ValueError, match="exist='maybe'"):
        rs.start("taken", exist=wrong)


async def test_connect(make_ray_store: MakeRayStore) -> None:
    """By name, or to the only one; an error lists what there is."""
    store = make_ray_store(name="one", namespace="mine")
    assert rs.connect("one", namespace="mine").info == store.info
    assert rs.connect(namespace="mine").info == store.info
    with pytest.raises(rs.StoreNotFoundError, match=r"No store 'two'.*'one'.*rs.connect\('one'\)"):
        rs.connect("two", namespace="mine")
    with pytest.raises(rs.StoreNotFoundError, match="there is no store there"):
        rs.connect("one", namespace="other")
    make_ray_store(name="two", namespace="mine")
    with pytest.raises(rs.StoreNotFoundError, match="Several stores"):
        rs.connect(namespace="mine")


async def test_stop_ends_a_detached_store(make_ray_store: MakeRayStore) -> None:
    """A detached store outlives its clients and is ended by name."""
    store = make_ray_store(name="kept", detached=True)
    store.close()
    again = rs.connect("kept")
    await again.enqueue_rollout("x")
    rs.stop("kept")

    async def gone() -> bool:
        return "kept" not in {info.name for info in rs.list_stores()}

    await until(gone)
    with pytest.raises(rs.StoreUnavailableError, match="kept.*died"):
        await again.enqueue_rollout("y")
    with pytest.raises(rs.StoreNotFoundError):
        rs.stop("kept")
    with pytest.raises(rs.StoreClosedError):
        await store.enqueue_rollout("z")


async def test_close_ends_what_this_process_started(cluster: None) -> None:
    """`with` ends the store; a closed client says so; other clients see that the store has died."""
    with rs.start() as store:
        other = rs.RayLightningStore(store.actor)
        waiting = asyncio.ensure_future(
            other.wait_for_rollouts(rollout_ids=[(await store.enqueue_rollout(1)).rollout_id])
        )
        await asyncio.sleep(0.2)
    with pytest.raises(rs.StoreClosedError, match="is closed"):
        await store.enqueue_rollout("x")
    with pytest.raises(rs.StoreUnavailableError, match="died"):
        await waiting
    async with rs.start() as store:
        assert (await store.statistics())["total_rollouts"] == 0


async def test_not_a_store(cluster: None) -> None:
    """A handle, or a name, of something else is refused by what it is."""

    class Other:
        def describe(self) -> int:
            return 5

    other = ray.remote(num_cpus=0)(Other)
    actor = other.options(name="other", namespace="raystore").remote()
    for thing in (actor, 5, None, other):
        with pytest.raises(rs.NotAStoreError, match="is not a raystore store"):
            rs.RayLightningStore(thing)
    with pytest.raises(rs.NotAStoreError):
        rs.connect("other")
    with pytest.raises(rs.NotAStoreError):
        rs.stop("other")
    ray.kill(actor)


async def test_clients_travel(make_ray_store: MakeRayStore) -> None:
    """A client may be pickled, passed to tasks, and made from the handle there; store.actor is what to pass on."""
    store = make_ray_store(span_size_estimator=lambda span: 7)

    def use(client: rs.RayLightningStore, handle: Any) -> Any:
        client.sync.enqueue_rollout("by client")
        made = rs.RayLightningStore(handle)
        rollout = present(made.sync.dequeue_rollout())
        made.sync.add_span(rs.Span.from_attributes(
            attributes={}, rollout_id=rollout.rollout_id, attempt_id=rollout.attempt.attempt_id
        ))  # fmt: skip
        return rollout.input, client.info.store_id, pickle.dumps(client)

    task_input, store_id, pickled = await ray.remote(num_cpus=0)(use).remote(store, store.actor)
    assert (task_input, store_id) == ("by client", store.info.store_id)
    copy = pickle.loads(pickled)
    assert (await copy.statistics())["total_span_bytes"] == 7
    assert copy.info == store.info
    assert ray.cloudpickle.loads(ray.cloudpickle.dumps(copy)).info == store.info


async def test_memory_store_refuses_to_be_pickled() -> None:
    """And says what to do instead."""
    with rs.InMemoryLightningStore() as store, pytest.raises(TypeError, match=r"raystore.start\(\)"):
        pickle.dumps(store)


async def test_errors_survive_a_real_call(cluster: None) -> None:
    """Every error can be raised in an actor and caught by its own class."""
    examples = [
        rs.InvalidValueError("a", 1, "b"), rs.RolloutNotFoundError("r"), rs.AttemptNotFoundError("r", "a"),
        rs.AttemptOverError("r", "a", "superseded"),
        rs.ResourcesNotFoundError("x"), rs.ClaimLostError("r", "a"), rs.ConflictError("r", ["input"]),
        rs.OverloadedError(1, 2, 3.0), rs.CursorTooOldError(1, 2), rs.SpansEvictedError("r"),
        rs.PayloadLostError("a", "b"), rs.PayloadTooLargeError("a", 2, 1), rs.PayloadNotPicklableError("a", "b"),
        rs.PayloadNotReadableError("a", "b", "c"), rs.PayloadNotReadableError("a", None, "c"),
        rs.StoreUnavailableError("s", "w"),
        rs.OutcomeUnknownError("s", "w"), rs.StoreClosedError("s"), rs.StoreCorruptError("v", "s", "t"),
        rs.StoreNotFoundError("n", "ns", ["x"]), rs.StoreExistsError("n", "ns", []), rs.NotAStoreError("x"),
        rs.ProtocolMismatchError("a", "b"), rs.AgentNotPicklableError("a", "b"), rs.PoolStartError("a", "b"),
        rs.PoolFailedError("p", 3, ["q"], "w"), rs.NoSuchResourceError("n", ["x"], "s"), rs.ForkedError("s"),
        rs.RayClientError("ray://x"), rs.AgentProcessError("w"), rs.JournalError("x"),
        rs.JournalDamagedError("f", 1, "w"), rs.JournalFormatError("f", 2, 1), rs.JournalMissingError("p", "w"),
        rs.JournalInUseError("p", "w"), rs.JournalFullError("p", 0.1), rs.JournalFailedError("p", "w"),
        rs.FencedError("p", 1), rs.SealedError("r", ["c"]), rs.BatchConflictError("c", "w"), rs.ReadOnlyError("p"),
        rs.AnswerGoneError(1), rs.JournalHeldError("p", 7, 2), rs.StoreOverloadedError("sessions", 3, 3, 5.0),
        rs.SessionEndedError("s"), rs.BatchHeldError("c", [[1, 2, "s"]], 1), rs.ConsumerFilterError("c", "a", "b"),
        rs.GroupConflictError("g", ["n"]), rs.ConsumerUnitError("c", "rollouts", "groups"),
        rs.RolloutSucceededError("r"), rs.FeedNotFoundError("f"), rs.FeedHeldError("f", "h"),
        rs.EvaluationConflictError("e", 1, ["items"]), rs.EvaluationNotFoundError("e", None, ["f"]),
        rs.VersionNotFoundError("r", 1, [2]), rs.FeedClosedError("f", "w"),
        rs.DatasetChangedError("f", "s", 3, 2), rs.VersionConflictError("f", 1, "w"),
        rs.FailureBudgetError("f", "w", [["e", 2, "r"]]), rs.FilteredTooManyError("f", 3, 2, "w"),
    ]  # fmt: skip

    def fail(error: Any) -> None:
        raise error

    from raystore import errors

    assert {type(e).__name__ for e in examples} == {*errors.__all__} - {"StoreError", "Abort", "Drop"}
    failing = ray.remote(num_cpus=0)(fail)
    refs = [failing.remote(example) for example in examples]
    for example, ref in zip(examples, refs, strict=True):
        with pytest.raises(type(example)) as caught:
            ray.get(ref)
        assert all(getattr(caught.value, name) == fact for name, fact in vars(example).items())
        assert str(pickle.loads(pickle.dumps(example))) == str(example)
        assert str(errors.from_record(*errors.to_record(example))) == str(example)


async def test_start_says_what_it_runs_with(make_ray_store: MakeRayStore, caplog: pytest.LogCaptureFixture) -> None:
    """Capacity and thresholds are logged."""
    with caplog.at_level(logging.INFO, "raystore"):
        make_ray_store(eviction_memory_threshold=1000)
    assert "eviction above 1000, down to 800" in caplog.text


@pytest.mark.long
def test_a_client_outlives_a_restart_of_ray_in_its_process(tmp_path: Path) -> None:
    """After ray.shutdown() calls say so and start no Ray of their own; connected again, the client finds its store."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import ray, raystore as rs
            from ray.cluster_utils import Cluster
            cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
            ray.init(address=cluster.address, logging_level="error")
            store = rs.start(detached=True)
            store.sync.enqueue_rollout("x")
            ray.shutdown()
            try:
                store.sync.dequeue_rollout()
            except rs.StoreUnavailableError as error:
                print("error:", error)
            assert not ray.is_initialized()
            ray.init(address=cluster.address, logging_level="error")
            print("claimed:", store.sync.dequeue_rollout().input)
            rs.stop(store)
            ray.shutdown()
            cluster.shutdown()
            """
        )
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert "is unavailable: Ray has been shut down" in done.stdout and "claimed: x" in done.stdout


@pytest.mark.long
def test_owned_store_dies_with_its_driver_and_leaves_nothing(tmp_path: Path) -> None:
    """A script that ends without closing prints no traceback and leaves no process behind."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import ray, raystore as rs
            ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="error")
            store = rs.start()
            rollout = store.sync.enqueue_rollout("x")
            claimed = store.sync.dequeue_rollout()
            print("pid", ray.get(store.actor.describe.remote())["pid"])
            """
        )
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    pid = int(done.stdout.split()[-1])
    import psutil

    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"
