"""Edges of runners: late and refused reports, tasks that cannot be opened, agents that misbehave when stopped."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import ray

import raystore as rs
from raystore.types.contract import RolloutConfig
from tests.conftest import MakeMemoryStore, MakeRayStore
from tests.helpers import AnyStore, present, until
from tests.runners.sleepers import patient, sleeping
from tests.runners.test_isolation import gone

variable = contextvars.ContextVar("variable", default=0)


@pytest.fixture
def store(make_memory_store: MakeMemoryStore) -> rs.InMemoryLightningStore:
    """A store in this process."""
    return make_memory_store()


async def run(
    store: AnyStore | AnyStore, agent: Any, tasks: list[str] | list[Any] | range, **options: Any
) -> list[Any]:
    """Enqueue tasks, run them with a pool, and return them finished."""
    config = options.pop("config", None)
    made = [await store.enqueue_rollout(task, config=config) for task in tasks]
    async with rs.RunnerPool(store, agent, size=1, **options):
        return await store.wait_for_rollouts(rollout_ids=[r.rollout_id for r in made], timeout=30)


@pytest.mark.parametrize("raised", [rs.Abort("down"), rs.Drop("long"), RuntimeError("bad")], ids=repr)
async def test_a_late_error_does_not_reopen_a_rollout(
    store: AnyStore, raised: rs.Abort | rs.Drop | RuntimeError
) -> None:
    """The rollout timed out and failed; what its agent raises afterwards changes nothing."""

    def agent(task: Any, ctx: rs.Context) -> None:
        time.sleep(0.5)
        raise raised

    (finished,) = await run(store, agent, ["x"], config=RolloutConfig(timeout_seconds=0.2))
    assert finished.status == "failed"  # and the pool, which has waited for the agent, has reported its end
    (attempt,) = await store.query_attempts(finished.rollout_id)
    assert attempt.outcome == "timeout"
    assert (await store.get_rollout_by_id(finished.rollout_id)).status == "failed"


async def test_a_task_that_an_agents_process_cannot_open(make_ray_store: MakeRayStore) -> None:
    """It fails in the end with the reason, and its place goes on: here, a reference that needs Ray."""
    store = make_ray_store()
    prompt = rs.PromptTemplate(template="here", engine="f-string")
    await store.update_resources("r", {"prompt": prompt})
    tasks = [{"x": ray.put([1])}, "fine"]
    finished = await run(store, lambda task, ctx: len(ctx.resources["prompt"].template), tasks, isolation="process")
    assert [(r.status, r.reward) for r in finished] == [("failed", None), ("succeeded", 4.0)]
    attempts = await store.query_attempts(finished[0].rollout_id)
    assert {a.outcome for a in attempts} == {"infra"}
    assert "cannot be opened in the agent's process" in present(attempts[0].error)


async def test_everything_ends_with_a_killed_runner(make_ray_store: MakeRayStore, tmp_path: Path) -> None:
    """Also an agent that is frozen, and what it started in a session of its own."""
    store = make_ray_store()

    def agent(task: Any, ctx: rs.Context) -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
        (tmp_path / "writing").write_text(f"{os.getpid()} {child.pid}")
        (tmp_path / "writing").rename(tmp_path / f"pids-{ctx.attempt.sequence_id}-{task}")
        os.kill(os.getpid(), signal.SIGSTOP)

    await store.enqueue_rollout("x")
    async with rs.RunnerPool(store, agent, size=1, isolation="process") as pool:

        async def started() -> list[Any]:
            return list(tmp_path.glob("pids-*"))

        (file,) = await until(started)
        pids = [int(pid) for pid in file.read_text().split()]
        worker = present(await store.get_worker_by_id(pool.worker_ids[0]))
        os.kill(present(worker.heartbeat_stats)["pid"], signal.SIGKILL)
        await until(lambda: gone(pids), within=10)


async def test_a_frozen_agent_ends_with_its_pool(make_ray_store: MakeRayStore, tmp_path: Path) -> None:
    """A pool that is left in the middle of a rollout leaves no process behind."""
    store = make_ray_store()

    def agent(task: Any, ctx: rs.Context) -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)

    await store.enqueue_rollout("x")
    with pytest.raises(KeyError):
        async with rs.RunnerPool(store, agent, size=1, isolation="process"):

            async def started() -> str | bool:
                return (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()

            pid = int(await until(started))
            raise KeyError
    await until(lambda: gone([pid]), within=10)


@pytest.mark.parametrize("flush_seconds", [0.05, 100])
async def test_a_refused_span_fails_its_attempt_and_no_other_span(
    make_memory_store: MakeMemoryStore, flush_seconds: float
) -> None:
    """Whether it was flushed or came with the final status."""
    store = make_memory_store(limits={"span_bytes": 100_000})

    def agent(task: Any, ctx: rs.Context) -> list[rs.Span] | float:
        with ctx.span("fine"):
            pass
        with ctx.span("large", text="x" * 200_000):
            pass
        with ctx.span("fine too"):
            time.sleep(0.3)
        if task == "strange":
            strange = rs.Span.from_attributes(attributes={})
            present(strange.__pydantic_extra__)["lock"] = threading.Lock()
            return [strange]
        return 1.0

    finished = await run(store, agent, ["x", "strange"], flush_seconds=flush_seconds)
    assert [r.status for r in finished] == ["failed", "failed"]
    for rollout in finished:
        names = [s.name for s in await store.query_spans(rollout.rollout_id)]
        assert names[:2] == ["fine", "fine too"]
        attempt = present(await store.get_latest_attempt(rollout.rollout_id))
        assert attempt.outcome == "agent_error" and "span of the agent was refused" in present(attempt.error)


def test_the_interpreter_does_not_wait_for_an_agent() -> None:
    """A pool in this process whose agent goes on for ever: the end of the program is its end."""
    code = """
import time, raystore as rs
def agent(task, ctx):
    time.sleep(1000)
store = rs.InMemoryLightningStore()
store.sync.enqueue_rollout("x")
pool = rs.RunnerPool(store, agent, size=1)
pool.start()
while not store.sync.query_rollouts(status_in=["preparing", "running"]):
    time.sleep(0.01)
pool.stop(drain=False)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)


@pytest.mark.parametrize("isolation", ["actor", "process"])
async def test_an_agent_that_answers_a_stop_with_an_error(
    store: AnyStore, isolation: Literal["actor", "process"]
) -> None:
    """It was stopped all the same: the timeout is retried, and a stopped pool gives the work back."""

    async def agent(task: Any, ctx: rs.Context) -> float:
        with ctx.span("begun"):
            pass
        try:
            await asyncio.sleep(1000 if ctx.attempt.sequence_id == 1 else 0)
        except asyncio.CancelledError:
            raise RuntimeError("interrupted") from None
        return 1.0

    config = RolloutConfig(max_attempts=3, retry_condition=["timeout"])
    (finished,) = await run(store, agent, ["x"], config=config, max_agent_seconds=0.3, isolation=isolation)
    attempts = await store.query_attempts(finished.rollout_id)
    assert (finished.status, [a.outcome for a in attempts]) == ("succeeded", ["timeout", "ok"])

    made = await store.enqueue_rollout("y")
    pool = rs.RunnerPool(store, agent, size=1, isolation=isolation, flush_seconds=0.05)
    await asyncio.to_thread(pool.start)

    async def runs() -> Any:
        return (await store.get_rollout_by_id(made.rollout_id)).status == "running"

    await until(runs)
    await asyncio.to_thread(pool.stop, drain=False)
    assert (await store.get_rollout_by_id(made.rollout_id)).status == "requeuing"


@pytest.mark.parametrize("agent", [patient, sleeping])
async def test_a_cancel_right_behind_its_rollout_is_heard_in_its_process(
    store: AnyStore, agent: Callable[..., float] | Callable[..., Coroutine[Any, Any, float]]
) -> None:
    """As soon as the runner has the rollout, when its process may not have begun with it."""

    async with rs.RunnerPool(store, agent, size=1, isolation="process", cancel_grace_seconds=1000):
        for number in range(25):
            made = await store.enqueue_rollout("long")
            await asyncio.sleep(0.0005 * (number % 10))
            await store.cancel_rollouts([made.rollout_id])
        quick = await store.enqueue_rollout("quick")
        assert present(await store.wait_for_rollout(quick.rollout_id, timeout=10)).status == "succeeded"


async def test_an_attempt_that_was_cancelled_does_not_time_out_too(store: AnyStore) -> None:
    """A deaf agent is over its time only after it was cancelled: the outcome stays."""

    def agent(task: Any, ctx: rs.Context) -> None:
        with ctx.span("begun"):
            pass
        time.sleep(1.0)
        raise RuntimeError("too late")

    made = await store.enqueue_rollout("x")
    async with rs.RunnerPool(store, agent, size=1, max_agent_seconds=0.6, flush_seconds=0.05):

        async def runs() -> Any:
            return (await store.get_rollout_by_id(made.rollout_id)).status == "running"

        await until(runs)
        await store.cancel_rollouts([made.rollout_id])
    assert present(await store.get_latest_attempt(made.rollout_id)).outcome == "cancelled"


async def test_a_process_that_cannot_be_set_up_again_is_tried_again(store: AnyStore, tmp_path: Path) -> None:
    """`setup` fails for a while after a crash: nobody is charged for it."""

    class Agent:
        def setup(self) -> None:
            if (tmp_path / "crashed").exists() and len(list(tmp_path.glob("try-*"))) < 2:
                (tmp_path / f"try-{time.monotonic()}").touch()
                raise OSError("not yet")

        def __call__(self, task: Any, ctx: rs.Context) -> float:
            if not (tmp_path / "crashed").exists():
                (tmp_path / "crashed").touch()
                os._exit(1)
            return 1.0

    (finished,) = await run(store, Agent, ["x"], isolation="process")
    assert [a.outcome for a in await store.query_attempts(finished.rollout_id)] == ["runner_lost", "ok"]
    assert len(list(tmp_path.glob("try-*"))) == 2


async def test_a_process_that_hangs_in_setup_can_be_cancelled(store: AnyStore, tmp_path: Path) -> None:
    """The rollout that it was made for is cancelled: it is killed, and another one is made for the next."""

    class Agent:
        def setup(self) -> None:
            if (tmp_path / "crashed").exists() and not (tmp_path / "hung").exists():
                (tmp_path / "hung").touch()
                time.sleep(1000)

        def __call__(self, task: Any, ctx: rs.Context) -> float:
            if task == "crash" and not (tmp_path / "crashed").exists():
                (tmp_path / "crashed").touch()
                os._exit(1)
            return 1.0

    made = await store.enqueue_rollout("crash")
    async with rs.RunnerPool(store, Agent, size=1, isolation="process", cancel_grace_seconds=0.1):

        async def hangs() -> bool:
            return (tmp_path / "hung").exists()

        await until(hangs)
        await store.cancel_rollouts([made.rollout_id])
        quick = await store.enqueue_rollout("quick")
        assert present(await store.wait_for_rollout(quick.rollout_id, timeout=10)).status == "succeeded"


@pytest.mark.parametrize("isolation", ["actor", "process"])
async def test_context_variables_do_not_leak_from_one_rollout_to_the_next(
    store: AnyStore, isolation: Literal["actor", "process"]
) -> None:
    """What an agent sets is gone when it has returned."""

    def agent(task: Any, ctx: rs.Context) -> float:
        from tests.runners.test_edges import variable

        before = variable.get()
        variable.set(1)
        return float(before)

    finished = await run(store, agent, range(3), isolation=isolation)
    assert [r.reward for r in finished] == [0.0, 0.0, 0.0]


async def test_what_is_closed_and_how(store: AnyStore, caplog: pytest.LogCaptureFixture) -> None:
    """An instance that the user made is not closed; an error in `close` is told and harms nobody."""
    closed = []

    class Agent:
        def __call__(self, task: Any, ctx: rs.Context) -> float:
            return 1.0

        def close(self) -> None:
            closed.append(1)
            raise OSError("cannot close")

    assert (await run(store, Agent(), ["x"]))[0].status == "succeeded" and closed == []
    assert (await run(store, Agent, ["x"]))[0].status == "succeeded" and closed == [1]
    assert "close() of the agent failed" in caplog.text


async def test_packed_arrays_are_copies(store: AnyStore) -> None:
    """An agent that goes on with its array does not change what it has recorded."""

    def agent(task: Any, ctx: rs.Context) -> None:
        prompt = array("i", [1])
        for _ in range(2):
            ctx.llm(prompt_ids=prompt, response_ids=[7])
            prompt.append(7)
        with ctx.span("mine", ids=prompt):
            prompt.append(8)

    first, second, mine = rs.run_one(agent, "x").spans
    assert [list(t.prompt_ids) for t in rs.triplets([first, second])] == [[1], [1, 7]]
    ids: Any = mine.attributes["ids"]
    assert list(ids) == [1, 7, 7]


def test_what_is_no_agent() -> None:
    """Found before anything starts."""

    class NotCallable:
        pass

    def generator(task: Any, ctx: rs.Context) -> Iterator[float]:
        yield 1.0

    with rs.InMemoryLightningStore() as store:
        no_agents: list[Any] = [NotCallable, generator, 7, lambda task: 1.0, lambda a, b, c: 1.0]
        for wrong in no_agents:
            with pytest.raises(rs.InvalidValueError, match="agent="):
                rs.RunnerPool(store, wrong)
        for right in (lambda *a: 1.0, functools.partial(lambda x, task, ctx: 1.0, 1), lambda task, ctx, more=1: 1.0):
            rs.RunnerPool(store, right)
        rs.RunnerPool(store, lambda task, ctx: 1.0).stop()  # never started


@pytest.mark.parametrize("error", [SystemExit(3), TimeoutError("no model")], ids=repr)
async def test_any_error_of_setup_stops_the_start(
    make_memory_store: MakeMemoryStore, make_ray_store: MakeRayStore, error: SystemExit | TimeoutError
) -> None:
    """With its text, whatever it is."""

    class Agent:
        def setup(self) -> None:
            raise error

        def __call__(self, task: Any, ctx: rs.Context) -> float:
            return 1.0

    text = "no model" if isinstance(error, TimeoutError) else "SystemExit"
    for store in (make_memory_store(), make_ray_store()):
        with pytest.raises(rs.PoolStartError, match=text):
            await asyncio.to_thread(rs.RunnerPool(store, Agent, size=1).start)


def test_odd_attributes_of_opentelemetry_are_kept() -> None:
    """What the SDK lets pass is recorded as it is: the agent must not fail for its trace."""
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider()

    def agent(task: Any, ctx: rs.Context) -> float:
        rs.otel.instrument(provider)
        attributes = {"mixed": ["a", None], "bytes": b"\xff", "fine": ("a", "b")}
        with provider.get_tracer("t").start_as_current_span("odd", attributes=attributes):
            pass
        return 1.0

    span, _ = rs.run_one(agent, "x").spans
    assert span.attributes["fine"] == ("a", "b") and span.attributes["mixed"] == ("a", None)
    assert span.attributes["bytes"] in (b"\xff", "b'\\xff'")  # the SDK's versions differ in what they hand on
