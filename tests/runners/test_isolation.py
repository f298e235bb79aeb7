"""Agents in processes of their own: what they see, how they are stopped, and what their deaths do."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest

import raystore as rs
from raystore.types.contract import RolloutConfig
from tests.conftest import MakeMemoryStore
from tests.helpers import AnyStore, mostly_in_memory, present, until
from tests.runners.sleepers import patient, sleeping


async def run(
    store: AnyStore | rs.InMemoryLightningStore,
    agent: Callable[..., float] | type[Any],
    tasks: list[str] | range,
    **options: Any,
) -> list[Any]:
    """Enqueue tasks, run them in processes, and return them finished."""
    made = [await store.enqueue_rollout(task) for task in tasks]
    async with rs.RunnerPool(store, agent, size=1, isolation="process", **options):
        return await store.wait_for_rollouts(rollout_ids=[r.rollout_id for r in made], timeout=40)


def is_alive(pid: Any) -> bool:
    """Whether a process runs."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_agents_run_in_processes_of_their_own(store: AnyStore) -> None:
    """With resources, spans, rewards and errors as in the runner's process; a process stays for the next rollout."""
    weights = list(range(50_000))
    await store.update_resources(
        "policy",
        {"p": rs.PromptTemplate(template="{x}!", engine="f-string"), "w": rs.ObjectResource(value=weights)},
        policy_version=3,
    )

    def agent(task: Any, ctx: rs.Context) -> float:
        assert (
            rs.current() is ctx
            and ctx.policy_version == 3
            and ctx.worker_id.startswith("runner-")
            and ctx.worker_id.endswith("-0")
        )
        if task == "raise":
            raise KeyError("gone wrong")
        if task == "drop":
            raise rs.Drop("too long")
        with ctx.span("outer"), ctx.span("inner", pid=os.getpid()) as span:
            span.set("text", ctx.resources["p"].format(x=task))
            span.set("sum", sum(ctx.resources["w"].get()))
        ctx.llm(prompt_ids=[1, 2], response_ids=[3], logprobs=[-0.5])
        return 0.5

    finished = await run(store, agent, ["a", "raise", "drop", "b"])
    assert [(r.status, r.reward) for r in finished] == [
        ("succeeded", 0.5), ("failed", None), ("failed", None), ("succeeded", 0.5),
    ]  # fmt: skip
    spans = await store.query_many_spans([r.rollout_id for r in finished])
    pids: set[Any] = set()
    for rollout, text in ((finished[0], "a!"), (finished[3], "b!")):
        inner, outer, llm, reward = spans[rollout.rollout_id]
        assert inner.parent_id == outer.span_id and inner.attributes["text"] == text
        assert inner.attributes["sum"] == sum(weights)
        assert rs.triplets([llm, reward])[0].reward == 0.5
        pids.add(inner.attributes["pid"])
    assert len(pids) == 1 and os.getpid() not in pids
    outcomes = [present(await store.get_latest_attempt(r.rollout_id)).outcome for r in finished]
    assert outcomes == ["ok", "agent_error", "dropped", "ok"]
    assert "KeyError: 'gone wrong'" in present(present(await store.get_latest_attempt(finished[1].rollout_id)).error)
    await until(lambda: gone(pids), within=10)  # ended with the pool


async def gone(pids: Iterable[int]) -> bool:
    """Whether all of these have ended."""
    return not any(is_alive(pid) for pid in pids)


@mostly_in_memory
async def test_async_agents_and_classes_in_processes(store: AnyStore) -> None:
    """One instance and one event loop in each process; concurrency means as many processes."""

    class Agent:
        async def setup(self) -> None:
            self.loop = asyncio.get_running_loop()
            self.calls = 0

        async def __call__(self, task: Any, ctx: rs.Context) -> None:
            assert asyncio.get_running_loop() is self.loop
            self.calls += 1
            await asyncio.sleep(0.05)
            with ctx.span("call", pid=os.getpid(), calls=self.calls):
                pass

    finished = await run(store, Agent, range(6), concurrency=2)
    assert [r.status for r in finished] == ["succeeded"] * 6
    spans = [s for of_one in (await store.query_many_spans([r.rollout_id for r in finished])).values() for s in of_one]
    by_pid: dict[Any, list[Any]] = {}
    for span in spans:
        by_pid.setdefault(span.attributes["pid"], []).append(span.attributes["calls"])
    assert len(by_pid) == 2 and all(sorted(calls) == list(range(1, len(calls) + 1)) for calls in by_pid.values())


async def test_a_process_is_killed_with_all_that_its_agent_started(store: AnyStore, tmp_path: Path) -> None:
    """Cancelled, an agent that does not listen is killed after the grace period, and so are its children."""
    started = tmp_path / "started"

    def agent(task: Any, ctx: rs.Context) -> float:
        if task != "stuck":
            return 1.0
        command = [sys.executable, "-c", "import time; time.sleep(100)"]
        children = [subprocess.Popen(command), subprocess.Popen(command, start_new_session=True)]
        (started.parent / "writing").write_text(" ".join(str(pid) for pid in [os.getpid(), *(c.pid for c in children)]))
        (started.parent / "writing").rename(started)
        while True:
            time.sleep(1)

    made = await store.enqueue_rollout("stuck")
    async with rs.RunnerPool(store, agent, size=1, isolation="process", cancel_grace_seconds=0.3):

        async def has_started() -> bool:
            return started.exists()

        await until(has_started)
        pids = [int(pid) for pid in started.read_text().split()]
        assert all(is_alive(pid) for pid in pids)
        cancelled = time.monotonic()
        await store.cancel_rollouts([made.rollout_id])
        await until(lambda: gone(pids), within=10)
        assert time.monotonic() - cancelled >= 0.3
        other = await store.enqueue_rollout("quick")
        (finished,) = await store.wait_for_rollouts(rollout_ids=[other.rollout_id], timeout=10)
        assert finished.status == "succeeded"
    assert (await store.get_rollout_by_id(made.rollout_id)).status == "cancelled"
    assert present(await store.get_latest_attempt(made.rollout_id)).outcome == "cancelled"


@mostly_in_memory
@pytest.mark.parametrize("agent", [patient, sleeping])
async def test_within_the_grace_period_an_agent_may_clean_up(
    store: AnyStore, agent: Callable[..., float] | Callable[..., Coroutine[Any, Any, float]]
) -> None:
    """Sync agents see it at check(), async ones are cancelled; what they send then is kept, and the process stays."""
    made = await store.enqueue_rollout("long")
    async with rs.RunnerPool(store, agent, size=1, isolation="process", flush_seconds=0.05):

        async def begun() -> rs.PaginatedResult[rs.Span]:
            return await store.query_spans(made.rollout_id)

        assert len(await until(begun)) == 1
        await store.cancel_rollouts([made.rollout_id])
        quick = await store.enqueue_rollout("quick")
        await store.wait_for_rollouts(rollout_ids=[quick.rollout_id], timeout=20)
        began, ended = await store.query_spans(made.rollout_id)
        assert (ended.name, ended.attributes) == ("ended", {"why": "cancelled", "cancelled": True})
        assert began.attributes == (await store.query_spans(quick.rollout_id))[0].attributes  # the same process


@mostly_in_memory
@pytest.mark.parametrize("way", ["SIGKILL", "segfault", "_exit", "exit"])
async def test_a_process_that_dies_takes_only_its_own_rollout(store: AnyStore, way: str) -> None:
    """It counts as a delivery, is offered again, and fails in the end; its neighbours in other processes go on."""

    def agent(task: Any, ctx: rs.Context) -> float:
        if task == "deadly":
            with ctx.span("last words"):
                pass
            if way == "SIGKILL":
                os.kill(os.getpid(), signal.SIGKILL)
            if way == "segfault":
                ctypes.string_at(0)
            if way == "_exit":
                os._exit(3)
            sys.exit(3)
        time.sleep(0.3)
        return 1.0

    finished = await run(store, agent, ["deadly", *["fine"] * 4], concurrency=3)
    assert [r.status for r in finished] == ["failed"] + ["succeeded"] * 4
    attempts = await store.query_attempts(finished[0].rollout_id)
    for rollout in finished[1:]:
        assert len(await store.query_attempts(rollout.rollout_id)) == 1
    if way == "exit":  # an exception like others
        assert [a.outcome for a in attempts] == ["agent_error"]
        return
    assert {(a.outcome, a.status) for a in attempts} == {("runner_lost", "unresponsive")}
    assert 1 < len(attempts) <= 4
    said = {"SIGKILL": "signal 9 (SIGKILL)", "segfault": "signal 11 (SIGSEGV)", "_exit": "exited with status 3"}
    assert said[way] in present(attempts[-1].error)
    spans = await store.query_spans(finished[0].rollout_id)
    assert [s.name for s in spans] == ["last words"] * len(attempts)  # a span is sent when it ends


async def test_an_agent_that_cannot_be_set_up_in_its_process_stops_the_start(store: AnyStore) -> None:
    """The cause is in the error."""

    class Agent:
        def setup(self) -> None:
            raise OSError("no model here")

        def __call__(self, task: Any, ctx: rs.Context) -> float:
            return 1.0

    with pytest.raises(rs.PoolStartError, match="no model here"):
        async with rs.RunnerPool(store, Agent, size=1, isolation="process"):
            pass


async def test_the_fork_server_may_be_killed(make_memory_store: MakeMemoryStore, tmp_path: Path) -> None:
    """The process that forks the others is made anew for the next rollout."""
    store = make_memory_store()

    def agent(task: Any, ctx: rs.Context) -> float:
        if task == "kill" and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(100)
        return 1.0

    finished = await run(store, agent, ["a", "kill", "b"])
    assert [r.status for r in finished] == ["succeeded"] * 3
    assert [a.outcome for a in await store.query_attempts(finished[1].rollout_id)] == ["runner_lost", "ok"]


@mostly_in_memory
@pytest.mark.parametrize("isolation", ["actor", "process"])
async def test_an_agent_that_takes_too_long_times_out(store: AnyStore, isolation: Literal["actor", "process"]) -> None:
    """After `max_agent_seconds` its attempt has status timeout at once; a retry follows the configuration."""

    async def agent(task: Any, ctx: rs.Context) -> float:
        with ctx.span("try"):
            await asyncio.sleep(100 if ctx.attempt.sequence_id == 1 else 0)
        return 1.0

    config = RolloutConfig(max_attempts=2, retry_condition=["timeout"])
    made = [await store.enqueue_rollout(i, config=c) for i, c in enumerate([None, config])]
    async with rs.RunnerPool(store, agent, size=2, isolation=isolation, max_agent_seconds=0.5):
        finished = await store.wait_for_rollouts(rollout_ids=[r.rollout_id for r in made], timeout=30)
        assert [r.status for r in finished] == ["failed", "succeeded"]
        attempts = [await store.query_attempts(r.rollout_id) for r in finished]
        assert [[a.outcome for a in several] for several in attempts] == [["timeout"], ["timeout", "ok"]]
        assert "max_agent_seconds=0.5" in present(attempts[0][0].error)
