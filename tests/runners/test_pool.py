"""The pool of runners, in process and on Ray: claims, spans, rewards, errors, deaths, shutdown."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import ray

import raystore as rs
from raystore.types.contract import RolloutConfig
from tests.conftest import MakeRayStore
from tests.helpers import AnyStore, mostly_in_memory, present, until


class Undecodable:
    """Pickles, and raises when it is unpickled in another process, or at a second time."""

    def __reduce__(self) -> Any:
        return _raise, ()


def _raise() -> None:
    raise ImportError("no such class here")


async def run(store: Any, agent: Any, tasks: Any, **options: Any) -> Any:
    """Enqueue tasks, run them with a pool, and return them finished."""
    made = [await store.enqueue_rollout(task) for task in tasks]
    async with rs.RunnerPool(store, agent, size=options.pop("size", 2), **options):
        return await store.wait_for_rollouts(rollout_ids=[r.rollout_id for r in made], timeout=40)


async def test_an_agent_returns_a_reward_and_emits_spans(store: AnyStore) -> None:
    """A number is the reward; spans nest, carry attributes, and are all there when the rollout has succeeded."""
    await store.update_resources(
        "prompts", {"p": rs.PromptTemplate(template="{x}!", engine="f-string")}, policy_version=7
    )

    def agent(task: Any, ctx: rs.Context) -> Any:
        assert rs.current() is ctx and ctx.policy_version == 7
        with ctx.span("outer", task=task) as outer, ctx.span("inner"):
            outer.set("prompt", ctx.resources["p"].format(x=task))
            outer.update({"nested": {"a": 1}, "numbers": [1, 2]})
        return task / 10

    finished = await run(store, agent, range(6))
    assert [(r.status, r.reward) for r in finished] == [("succeeded", i / 10) for i in range(6)]
    spans = await store.query_many_spans([r.rollout_id for r in finished])
    for i, rollout in enumerate(finished):
        inner, outer, reward = spans[rollout.rollout_id]
        assert (outer.name, inner.name, reward.name) == ("outer", "inner", "agentlightning.annotation")
        assert inner.parent_id == outer.span_id and outer.parent_id is None
        assert outer.attributes == {"task": i, "prompt": f"{i}!", "nested": {"a": 1}, "numbers": [1, 2]}
        assert [s.sequence_id for s in (inner, outer, reward)] == [1, 2, 3]
        attempt = present(await store.get_latest_attempt(rollout.rollout_id))
        assert (attempt.outcome, attempt.policy_version) == ("ok", 7)
        assert present(attempt.worker_id).startswith("runner-")


async def test_async_agents_share_a_runner_without_mixing(store: AnyStore) -> None:
    """Concurrent rollouts of one process keep their spans apart."""

    async def agent(task: Any, ctx: rs.Context) -> None:
        with ctx.span(f"a{task}"):
            await asyncio.sleep(0.05)
            with present(rs.current()).span(f"b{task}"):
                await asyncio.sleep(0.05)
        ctx.reward(task, length=3)

    finished = await run(store, agent, range(8), size=1, concurrency=8)
    assert [r.reward for r in finished] == list(range(8))
    for i, rollout in enumerate(finished):
        names = [s.name for s in await store.query_spans(rollout.rollout_id)]
        assert names == [f"b{i}", f"a{i}", "agentlightning.annotation"]


@mostly_in_memory
async def test_an_agent_class_has_one_instance_for_each_runner(store: AnyStore) -> None:
    """setup once, called for each rollout, closed at the end."""

    class Agent:
        def setup(self) -> None:
            self.calls = 0

        def __call__(self, task: Any, ctx: rs.Context) -> float:
            self.calls += 1
            return float(self.calls)

        def close(self) -> None:
            self.calls = -1

    finished = await run(store, Agent, range(4), size=1)
    assert sorted(r.reward for r in finished) == [1, 2, 3, 4]


@mostly_in_memory
async def test_an_agent_at_work_is_running_before_its_first_span_has_ended(store: AnyStore) -> None:
    """Attempt and rollout say so soon after the claim, although the agent has told nothing yet."""

    async def agent(task: Any, ctx: rs.Context) -> None:
        with ctx.span("long"):
            await asyncio.sleep(1000)

    made = await store.enqueue_rollout("x")
    async with rs.RunnerPool(store, agent, size=1, flush_seconds=0.1):

        async def runs() -> Any:
            found = await store.get_rollout_by_id(made.rollout_id)
            return found.status == "running" and found.attempt.status == "running"

        await until(runs)
        assert await store.query_spans(made.rollout_id) == []
        await store.cancel_rollouts([made.rollout_id])


@mostly_in_memory
async def test_what_agents_raise(store: AnyStore) -> None:
    """An exception fails its attempt with its traceback; Abort is delivered again, Drop never; the pool goes on."""

    def agent(task: Any, ctx: rs.Context) -> str | float:
        with ctx.span("work"):
            if task == "raise":
                raise KeyError("gone wrong")
            if task == "abort":
                raise rs.Abort("sandbox down")
            if task == "drop":
                raise rs.Drop("too long")
            if task == "nonsense":
                return "a text"
        return 1.0

    finished = await run(store, agent, ["raise", "abort", "drop", "nonsense", "fine"], size=1)
    assert [r.status for r in finished] == ["failed", "failed", "failed", "failed", "succeeded"]
    attempts = [await store.query_attempts(r.rollout_id) for r in finished]
    assert [[a.outcome for a in several] for several in attempts] == [
        ["agent_error"], ["infra"] * 3, ["dropped"], ["agent_error"], ["ok"],
    ]  # fmt: skip
    assert "KeyError: 'gone wrong'" in present(attempts[0][0].error)
    assert "expected a number" in present(attempts[3][0].error)
    spans = await store.query_spans(finished[0].rollout_id)
    assert spans[0].status.status_code == "ERROR" and spans[0].events[0].name == "exception"


@mostly_in_memory
async def test_agents_that_fail_are_retried_by_configuration(store: AnyStore) -> None:
    """A retry condition of the rollout works with the pool."""
    config = RolloutConfig(max_attempts=3, retry_condition=["failed"])
    made = await store.enqueue_rollout("x", config=config)

    def agent(task: Any, ctx: rs.Context) -> float:
        if ctx.attempt.sequence_id < 3:
            raise RuntimeError("not yet")
        return 1.0

    async with rs.RunnerPool(store, agent, size=2):
        (finished,) = await store.wait_for_rollouts(rollout_ids=[made.rollout_id], timeout=30)
    assert (finished.status, finished.reward) == ("succeeded", 1.0)
    assert len(await store.query_attempts(made.rollout_id)) == 3


@mostly_in_memory
async def test_agents_that_fail_are_retried_by_rules(store: AnyStore) -> None:
    """Each outcome by its own, after its delay; a rollout that has failed for good succeeds once it is requeued."""
    rules: dict[rs.RetryOutcome, rs.RetryRule] = {
        "agent_error": rs.RetryRule(max_retries=1, backoff_seconds=0.3, jitter=0),
        "infra": rs.RetryRule(max_retries=1, backoff_seconds=0.3, jitter=0),
    }
    made = await store.enqueue_rollout("x", config=RolloutConfig(retry_rules=rules))

    def agent(task: Any, ctx: rs.Context) -> float:
        if ctx.attempt.sequence_id == 1:
            raise rs.Abort("the sandbox is down")
        if ctx.attempt.sequence_id < 4:
            raise RuntimeError("not yet")
        return 1.0

    async with rs.RunnerPool(store, agent, size=2):
        (finished,) = await store.wait_for_rollouts(rollout_ids=[made.rollout_id], timeout=30)
        assert finished.status == "failed"
        await store.requeue([made.rollout_id])
        (finished,) = await store.wait_for_rollouts(rollout_ids=[made.rollout_id], timeout=30)
    assert (finished.status, finished.reward) == ("succeeded", 1.0)
    attempts = await store.query_attempts(made.rollout_id)
    assert [attempt.outcome for attempt in attempts] == ["infra", "agent_error", "agent_error", "ok"]
    for before, after in itertools.pairwise(attempts[:3]):
        assert before.end_time is not None and after.start_time >= before.end_time + 0.3


@mostly_in_memory
async def test_heartbeats_keep_a_blocking_agent_alive(store: AnyStore) -> None:
    """A slow agent that blocks its thread is not taken for dead."""

    def agent(task: Any, ctx: rs.Context) -> float:
        threading.Event().wait(1.5)
        return 1.0

    made = await store.enqueue_rollout("x", config=RolloutConfig(unresponsive_seconds=0.6))
    async with rs.RunnerPool(store, agent, size=1) as pool:
        (finished,) = await store.wait_for_rollouts(rollout_ids=[made.rollout_id], timeout=30)
        assert finished.status == "succeeded"
        (worker,) = await store.query_workers()
        assert [worker.worker_id] == pool.worker_ids


@mostly_in_memory
async def test_short_rollouts_do_not_keep_a_long_one_from_its_heartbeats(store: AnyStore) -> None:
    """Each start makes the heartbeat thread look again, and must not make it wait again."""

    def agent(task: Any, ctx: rs.Context) -> None:
        threading.Event().wait(2 if task == "long" else 0.02)

    long = await store.enqueue_rollout("long", config=RolloutConfig(unresponsive_seconds=0.6))
    await store.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input="short")] * 300)
    async with rs.RunnerPool(store, agent, size=1, concurrency=3) as pool:
        finished = present(await store.wait_for_rollout(long.rollout_id, timeout=30))
        assert finished.status == "succeeded" and len(await store.query_attempts(long.rollout_id)) == 1
        worker = present(await store.get_worker_by_id(pool.worker_ids[0]))
        assert present(worker.heartbeat_stats)["pid"]


@mostly_in_memory
async def test_cancelling_reaches_an_async_agent(store: AnyStore) -> None:
    """The agent's task is cancelled, and its slot takes the next rollout."""

    async def agent(task: Any, ctx: rs.Context) -> float:
        if task == "long":
            await asyncio.sleep(100)
        return 1.0

    made = await store.enqueue_rollout("long")
    async with rs.RunnerPool(store, agent, size=1):

        async def is_running() -> bool:
            return (await store.get_rollout_by_id(made.rollout_id)).status in ("preparing", "running")

        await until(is_running)
        await store.cancel_rollouts([made.rollout_id])
        short = await store.enqueue_rollout("short")
        (finished,) = await store.wait_for_rollouts(rollout_ids=[short.rollout_id], timeout=20)
        assert finished.status == "succeeded"
    assert (await store.get_rollout_by_id(made.rollout_id)).status == "cancelled"


async def test_closing_drains_what_runs(store: AnyStore) -> None:
    """Leaving the pool lets a short rollout finish and claims nothing more."""

    async def agent(task: Any, ctx: rs.Context) -> float:
        with ctx.span("begun"):
            pass
        await asyncio.sleep(0.5)
        return 1.0

    made = [await store.enqueue_rollout(i) for i in range(5)]
    pool = rs.RunnerPool(store, agent, size=1, flush_seconds=0.05)
    pool.start()

    async def is_running() -> Any:
        return (await store.get_rollout_by_id(made[0].rollout_id)).status == "running"

    await until(is_running)
    await asyncio.to_thread(pool.stop)
    statuses = [r.status for r in await store.query_rollouts()]
    assert statuses[0] == "succeeded" and statuses[-1] == "queuing" and "preparing" not in statuses


async def test_a_start_that_is_cancelled_leaves_no_runner(store: AnyStore, tmp_path: Path) -> None:
    """The caller gives up while the runners are being made: none of them is left to claim what comes."""

    class Agent:
        async def setup(self) -> None:
            (tmp_path / f"setup-{os.getpid()}").touch()
            await asyncio.sleep(1.5)

        def __call__(self, task: Any, ctx: rs.Context) -> float:
            return 1.0

    pool = rs.RunnerPool(store, Agent, size=1)
    starting = asyncio.create_task(pool.__aenter__())

    async def begun() -> list[Any]:
        return list(tmp_path.glob("setup-*"))

    await until(begun)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    made = await store.enqueue_rollout("x")
    assert await store.wait_for_rollout(made.rollout_id, timeout=2.5) is None
    assert (await store.get_rollout_by_id(made.rollout_id)).status == "queuing"


@mostly_in_memory
async def test_bad_arguments(store: AnyStore) -> None:
    """A pool that cannot work is refused before anything starts."""
    with pytest.raises(ValueError, match="size=0"):
        rs.RunnerPool(store, lambda task, ctx: None, size=0)
    with pytest.raises(ValueError, match="agent="):
        rs.RunnerPool(store, "agent")  # type: ignore[arg-type]  # wrong on purpose


async def test_a_killed_runner_is_replaced_and_its_work_done(make_ray_store: MakeRayStore) -> None:
    """SIGKILL in mid-rollout: the attempt is lost, the rollout offered again at once, a new runner takes over."""
    store = make_ray_store()

    def agent(task: Any, ctx: rs.Context) -> float:
        if ctx.attempt.sequence_id == 1 and task == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        return 1.0

    deadly = await store.enqueue_rollout("deadly")
    others = await store.enqueue_group("fine", 10)
    async with rs.RunnerPool(store, agent, size=2) as pool:
        ids = [deadly.rollout_id, *(r.rollout_id for r in others)]
        finished = await store.wait_for_rollouts(rollout_ids=ids, timeout=40)
        assert [r.status for r in finished] == ["succeeded"] * 11
        lost, done = await store.query_attempts(deadly.rollout_id)
        assert (lost.status, lost.outcome, done.outcome) == ("unresponsive", "runner_lost", "ok")

        async def replaced() -> bool:
            return any("." in worker_id for worker_id in pool.worker_ids)

        await until(replaced)


async def test_work_that_kills_runners_while_their_pool_starts(make_ray_store: MakeRayStore) -> None:
    """Such a runner has started, and is replaced as ever: the pool does not fail to start because of what it ran."""
    store = make_ray_store()

    def agent(task: Any, ctx: rs.Context) -> float:
        if ctx.attempt.sequence_id == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return 1.0

    for _ in range(4):
        deadly = await store.enqueue_group("deadly", 3)
        async with rs.RunnerPool(store, agent, size=3):
            finished = await store.wait_for_rollouts(rollout_ids=[r.rollout_id for r in deadly], timeout=60)
        assert [r.status for r in finished] == ["succeeded"] * 3


async def test_a_rollout_that_always_kills_its_runner_fails(make_ray_store: MakeRayStore) -> None:
    """It is found in at most 1 + max_deliveries losses, and its neighbours are not charged."""
    # Runners that come up late on a busy machine must not let it be lost together with another one again.
    store = make_ray_store(max_deliveries=2, suspect_patience_seconds=60)

    def agent(task: Any, ctx: rs.Context) -> float:
        if task == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        return 1.0

    deadly = await store.enqueue_rollout("deadly")
    others = await store.enqueue_group("fine", 6)
    async with rs.RunnerPool(store, agent, size=2, concurrency=2):
        ids = [deadly.rollout_id, *(r.rollout_id for r in others)]
        finished = await store.wait_for_rollouts(rollout_ids=ids, timeout=60)
    assert [r.status for r in finished] == ["failed"] + ["succeeded"] * 6
    attempts = await store.query_attempts(deadly.rollout_id)
    assert {a.outcome for a in attempts} == {"runner_lost"} and 2 <= len(attempts) <= 3


async def test_an_unpicklable_agent_is_named_before_any_actor_starts(make_ray_store: MakeRayStore) -> None:
    """The error says what to do."""
    store = make_ray_store()
    lock = threading.Lock()

    def agent(task: Any, ctx: rs.Context) -> float:
        with lock:
            return 1.0

    with pytest.raises(rs.AgentNotPicklableError, match="Agent agent cannot be pickled"):
        rs.RunnerPool(store, agent)


async def test_a_pool_that_cannot_be_scheduled_says_so(make_ray_store: MakeRayStore) -> None:
    """What was asked for, and what the cluster has."""
    store = make_ray_store()
    pool = rs.RunnerPool(store, lambda task, ctx: 1.0, size=1, num_cpus=512, start_timeout=2)
    with pytest.raises(rs.PoolStartError, match=r"1 runners, each .*512.*The cluster has: CPU"):
        await asyncio.to_thread(pool.start)


async def test_an_agent_that_cannot_be_set_up_stops_the_start(make_ray_store: MakeRayStore) -> None:
    """The cause is in the error."""
    store = make_ray_store()

    class Agent:
        def setup(self) -> None:
            raise OSError("no model here")

        def __call__(self, task: Any, ctx: rs.Context) -> float:
            return 1.0

    with pytest.raises(rs.PoolStartError, match="A runner could not be made: .*no model here"):
        async with rs.RunnerPool(store, Agent, size=1):
            pass


async def test_users_can_write_their_own_runner(make_ray_store: MakeRayStore) -> None:
    """A user's actor wraps the handle; the pool is a convenience."""
    store = make_ray_store()

    class MyRunner:
        def __init__(self, handle: Any) -> None:
            self.store = rs.RayLightningStore(handle)

        async def run(self, n: Any) -> None:
            for _ in range(n):
                rollout = await self.store.dequeue_rollout("mine", timeout=10)
                assert rollout is not None
                await self.store.update_attempt(rollout.rollout_id, "latest", status="succeeded")

    made = await store.enqueue_group("x", 5)
    runner: Any = ray.remote(num_cpus=0)(MyRunner).remote(store.actor)
    await runner.run.remote(5)
    finished = await store.wait_for_rollouts(rollout_ids=[r.rollout_id for r in made], timeout=0)
    assert len(finished) == 5


@mostly_in_memory
async def test_an_agent_that_cancels_itself_fails_alone(store: AnyStore) -> None:
    """A cancellation that did not come from outside is the agent's error; the runner goes on."""

    async def agent(task: Any, ctx: rs.Context) -> float:
        if task == "cancels":
            inner = asyncio.ensure_future(asyncio.sleep(10))
            inner.cancel()
            await inner
        return 1.0

    finished = await run(store, agent, ["cancels", "fine"], size=1)
    assert [r.status for r in finished] == ["failed", "succeeded"]
    assert "cancelled itself" in present(present(await store.get_latest_attempt(finished[0].rollout_id)).error)


async def test_a_stopped_runner_gives_back_what_it_runs(store: AnyStore) -> None:
    """Without draining, what runs is offered again at once, and nobody is blamed."""

    async def agent(task: Any, ctx: rs.Context) -> None:
        with ctx.span("begun"):
            pass
        await asyncio.sleep(100)

    made = await store.enqueue_rollout("x")
    pool = rs.RunnerPool(store, agent, size=1, flush_seconds=0.05)
    await asyncio.to_thread(pool.start)

    async def is_running() -> Any:
        return (await store.get_rollout_by_id(made.rollout_id)).status == "running"

    await until(is_running)
    await asyncio.to_thread(pool.stop, drain=False)
    assert (await store.get_rollout_by_id(made.rollout_id)).status == "requeuing"
    assert present(await store.dequeue_rollout()).rollout_id == made.rollout_id


async def test_a_task_that_nobody_can_decode_fails_in_the_end(store: AnyStore) -> None:
    """It is given back with the reason, up to max_deliveries; the runner takes the next one."""
    made = await store.enqueue_rollout(Undecodable(), rollout_id="bad")
    with pytest.raises(rs.PayloadNotReadableError):  # here neither, but the record is delivered
        made.input  # noqa: B018
    await store.enqueue_rollout("good", rollout_id="good")
    async with rs.RunnerPool(store, lambda task, ctx: 1.0, size=1):

        async def both() -> bool:
            return (await store.statistics())["rollouts_by_status"] == {"failed": 1, "succeeded": 1}

        await until(both, within=40)
    attempts = await store.query_attempts("bad")
    assert {a.outcome for a in attempts} == {"infra"} and "PayloadNotReadableError" in present(attempts[0].error)


@mostly_in_memory
@pytest.mark.parametrize("ending", [SystemExit(2), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("is_async", [False, True])
async def test_an_agent_that_wants_to_end_the_process_fails_alone(
    store: AnyStore, ending: SystemExit | KeyboardInterrupt, is_async: bool
) -> None:
    """`sys.exit` in an agent (argparse does it) is its own error; the runner and the driver go on."""

    def agent(task: Any, ctx: rs.Context) -> float:
        if task == "exit":
            raise ending
        return 1.0

    async def async_agent(task: Any, ctx: rs.Context) -> float:
        return agent(task, ctx)

    finished = await run(store, async_agent if is_async else agent, ["exit", "fine"], size=1)
    assert [r.status for r in finished] == ["failed", "succeeded"]
    attempt = present(await store.get_latest_attempt(finished[0].rollout_id))
    assert attempt.outcome == "agent_error" and type(ending).__name__ in present(attempt.error)
    assert any(type(ending).__name__ in line for line in await store.story(finished[0].rollout_id))


async def test_rewards_of_any_kind_of_number() -> None:
    """numpy's numbers, and True for a right answer; NaN, texts, and resources that do not exist are refused loudly."""
    import numpy as np

    values = {"np": np.float32(0.5), "array": np.array(0.25), "true": True, "nan": float("nan")}

    def agent(task: Any, ctx: rs.Context) -> Any:
        if task == "text":
            ctx.reward("0.5")  # type: ignore[arg-type]  # wrong on purpose
        return values.get(task)

    with rs.InMemoryLightningStore() as store:
        finished = await run(store, agent, [*values, "text"])
        assert [r.reward for r in finished] == [0.5, 0.25, 1.0, None, None]
        assert [r.status for r in finished] == ["succeeded"] * 3 + ["failed"] * 2
        attempt = present(await store.get_latest_attempt(finished[3].rollout_id))
        assert "reward=nan is not valid" in present(attempt.error)
        lost = await store.enqueue_rollout("np", resources_id="nope")
        async with rs.RunnerPool(store, agent, size=1):
            await store.wait_for_rollout(lost.rollout_id, timeout=20)
        attempt = present(await store.get_latest_attempt(lost.rollout_id))
        assert (attempt.outcome, "Resources nope not found" in present(attempt.error)) == ("infra", True)


async def test_agent_errors_are_told_once_for_each_place(caplog: pytest.LogCaptureFixture) -> None:
    """A run in which every agent fails is not silent, and not a flood either."""

    def agent(task: Any, ctx: rs.Context) -> None:
        raise KeyError(f"prompt {task}")

    with rs.InMemoryLightningStore() as store, caplog.at_level("WARNING", "raystore.runner"):
        await run(store, agent, range(10), size=1)
    told = [record.getMessage() for record in caplog.records if "The agent failed" in record.getMessage()]
    assert len(told) == 1 and "KeyError: 'prompt 0' (KeyError at" in told[0] and "test_pool.py:" in told[0]


@pytest.mark.parametrize(
    "bad",
    [
        {"queues": "default"},
        {"queues": ()},
        {"heartbeat_seconds": -1},
        {"flush_seconds": "a"},
        {"max_agent_seconds": 0},
        {"cancel_grace_seconds": -1},
        {"isolation": "thread"},
        {"concurrency": 0},
    ],
    ids=str,
)
async def test_bad_options_of_a_pool(bad: dict[str, str] | dict[str, tuple[Any]] | dict[str, int]) -> None:
    """A pool that would never claim anything, or never send, is not made."""
    with rs.InMemoryLightningStore() as store, pytest.raises(ValueError, match=next(iter(bad))):
        rs.RunnerPool(store, lambda task, ctx: None, **bad)
    with pytest.raises(rs.NotAStoreError):
        rs.RunnerPool("store", lambda task, ctx: None)  # type: ignore[arg-type]  # wrong on purpose
