"""Agents that switch to newer weights while they run, and what is kept of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any, Literal

import pytest

import raystore as rs
from tests.conftest import MakeMemoryStore
from tests.helpers import AnyStore, claim, present, until

Isolation = Literal["actor", "process"]
both = pytest.mark.parametrize("isolation", ["actor", "process"])


def weights(number: int) -> dict[str, Any]:
    return {"w": rs.ObjectResource(value=number)}


def call(ctx: rs.Context, prompt: list[int]) -> list[int]:
    """One call of a model, whose answer is the weights; the conversation after it."""
    answer = [ctx.resources["w"].get(), 0]
    ctx.llm(prompt_ids=prompt, response_ids=answer, logprobs=[0.0, 0.0])
    return prompt + answer


async def refreshing(task: Any, ctx: rs.Context) -> float:
    """Calls the model until there are newer weights, and once more with these."""
    tokens = call(ctx, ctx.saved or [1])
    assert ctx.policy_version == ctx.attempt.policy_version
    assert not await ctx.refresh()
    with ctx.span("waits"):
        pass
    while not await ctx.refresh():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert ctx.policy_version == ctx.resources["w"].get() != ctx.attempt.policy_version
    tokens = call(ctx, tokens)
    await ctx.save(tokens)
    if task == "aborts" and ctx.attempt.sequence_id == 1:
        raise rs.Abort("once")
    return 1.0


def refreshing_in_thread(task: Any, ctx: rs.Context) -> float:
    """The same for an agent that is not async."""
    tokens = call(ctx, ctx.saved or [1])
    with ctx.span("waits"):
        pass
    while not ctx.sync.refresh():
        ctx.check()
    call(ctx, tokens)
    return 1.0


async def waiting(store: AnyStore, rollout_id: str, times: int = 1) -> None:
    async def waits() -> bool:
        return len(await store.query_spans(rollout_id, name="waits")) >= times

    await until(waits)


@both
@pytest.mark.parametrize("agent", [refreshing, refreshing_in_thread])
async def test_each_token_has_the_version_that_wrote_it(
    store: AnyStore, isolation: Isolation, agent: Callable[..., Any]
) -> None:
    """Within one trajectory; the attempt keeps the versions of its claim, from which staleness counts."""
    await store.update_resources("main", weights(5), policy_version=5)
    async with rs.RunnerPool(store, agent, size=1, isolation=isolation, flush_seconds=0.05):
        made = await store.enqueue_rollout("x")
        await waiting(store, made.rollout_id)
        await store.update_resources("main", weights(6), policy_version=6)
        done = present(await store.wait_for_rollout(made.rollout_id, timeout=30))
    assert (done.status, done.attempt.policy_version, done.attempt.resources_version) == ("succeeded", 5, 1)
    (found,) = rs.trajectories(await store.query_spans(made.rollout_id, "latest"))
    assert list(found.token_ids) == [1, 5, 0, 6, 0]
    assert list(found.policy_versions) == [-1, 5, 5, 6, 6]


async def test_each_token_has_its_version_also_after_a_resume(store: AnyStore) -> None:
    """The next attempt has the newest weights at its claim; what it took over keeps the versions that wrote it."""
    await store.update_resources("main", weights(5), policy_version=5)
    async with rs.RunnerPool(store, refreshing, size=1, flush_seconds=0.05):
        made = await store.enqueue_rollout("aborts")
        for number in (6, 7):
            await waiting(store, made.rollout_id, times=number - 5)
            await store.update_resources("main", weights(number), policy_version=number)
        done = present(await store.wait_for_rollout(made.rollout_id, timeout=30))
    assert (done.status, done.attempt.policy_version) == ("succeeded", 6)
    (found,) = rs.trajectories(await store.query_spans(made.rollout_id, "latest"))
    assert list(found.token_ids) == [1, 5, 0, 6, 0, 6, 0, 7, 0]
    assert list(found.policy_versions) == [-1, 5, 5, 6, 6, 6, 6, 7, 7]


async def test_what_an_attempt_has_switched_to_stays_as_long_as_it_lives(make_memory_store: MakeMemoryStore) -> None:
    """However many versions follow; once the attempt has ended, or switched again, it may go."""
    store = make_memory_store(clock="manual")

    async def is_there(version: int) -> bool:
        try:
            return await store.get_resources_by_id("main", version) is not None
        except rs.PayloadLostError:
            return False

    await store.update_resources("main", weights(0))
    rollout = await claim(store)
    ids = rollout.rollout_id, rollout.attempt.attempt_id
    assert await store.refresh_attempt(*ids) is None
    await store.update_resources("main", weights(1), policy_version=1)
    assert await store.refresh_attempt(*ids) == ("main", 2, 1)
    assert await store.refresh_attempt(*ids) is None
    for number in range(2, 20):
        await store.update_resources("main", weights(number), policy_version=number)
    assert await is_there(1) and await is_there(2) and not await is_there(3)
    assert await store.refresh_attempt(*ids) == ("main", 20, 19)
    assert await is_there(1) and not await is_there(2)
    await store.update_resources("main", weights(20))
    assert await is_there(20)
    await store.update_attempt(*ids, status="succeeded")
    assert not await is_there(1) and not await is_there(20) and await is_there(21)
    with pytest.raises(rs.AttemptOverError):
        await store.refresh_attempt(*ids)
    with pytest.raises(rs.RolloutNotFoundError):
        await store.refresh_attempt("ro-none", "at-none")


async def test_there_is_nothing_newer(make_memory_store: MakeMemoryStore) -> None:
    """Where nothing was published, and without a store."""
    store = make_memory_store(clock="manual")
    rollout = await claim(store)
    assert await store.refresh_attempt(rollout.rollout_id, rollout.attempt.attempt_id) is None

    async def agent(task: Any, ctx: rs.Context) -> float:
        return float(await ctx.refresh())

    assert rs.run_one(agent, "x", weights(3)).reward == 0.0
    assert rs.run_one(lambda task, ctx: float(ctx.sync.refresh()), "x").reward == 0.0


async def test_a_sample_of_a_pinned_evaluation_keeps_its_version(store: AnyStore) -> None:
    """It measures the version that it is pinned to, whatever is published meanwhile."""
    await store.update_resources(
        "main", {"prompt": rs.PromptTemplate(template="a", engine="f-string")}, policy_version=3
    )
    evaluation = await store.evaluate("held out", [1], resources_id="main", version=3, samples=1)
    rollout = present(await store.dequeue_rollout(timeout=30))
    await store.update_resources(
        "main", {"prompt": rs.PromptTemplate(template="b", engine="f-string")}, policy_version=4
    )
    assert await store.refresh_attempt(rollout.rollout_id, rollout.attempt.attempt_id) is None
    await store.finish_attempt(rollout.rollout_id, rollout.attempt.attempt_id, [], "succeeded")
    assert (await evaluation.result()).versions == (3, 3)


class OddError(Exception):
    """An error that cannot be unpickled."""

    def __init__(self, text: str, more: int) -> None:
        super().__init__(text)


class Weights:
    """A value that some process cannot read, or not pickle again."""

    def __init__(self, fault: str, is_copy: bool = False) -> None:
        self.fault = fault
        self.is_copy = is_copy

    def __reduce__(self) -> Any:
        if self.is_copy and self.fault == "cannot be pickled again":
            raise OddError("there is a lock in it", 1)
        return copy_of, (self.fault, os.getpid())


def copy_of(fault: str, sender: int) -> Weights:
    """Unpickle them."""
    if fault == "cannot be read" or (fault == "cannot be read elsewhere" and os.getpid() != sender):
        raise OddError("another version", 1)
    return Weights(fault, is_copy=True)


async def told(task: Any, ctx: rs.Context) -> float:
    """Refreshes until it has good weights, and counts what it was told of others; its process is its reward."""
    with ctx.span("waits"):
        pass
    while task == "refreshes":
        try:
            if await ctx.refresh():
                break
        except rs.StoreError as error:
            with ctx.span("told", error=str(error)):
                assert ctx.resources["w"].get() == ctx.policy_version == 0
        await asyncio.sleep(0.05)
    assert ctx.resources["w"].get() == ctx.policy_version == 2
    return float(os.getpid())


@both
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("cannot be read", "cannot be read in this process (OddError: another version)"),
        ("cannot be read elsewhere", "cannot be read in this process (OddError: another version)"),
        ("cannot be pickled again", "cannot be pickled (OddError: there is a lock in it)"),
    ],
)
async def test_newest_weights_that_cannot_be_had_are_told(
    make_memory_store: MakeMemoryStore, isolation: Isolation, fault: str, said: str
) -> None:
    """The agent keeps those that it has, and gets the next ones; its process serves the next rollout."""
    store = make_memory_store()
    await store.update_resources("main", weights(0), policy_version=0)
    async with rs.RunnerPool(store, told, size=1, isolation=isolation, flush_seconds=0.05):
        first = await store.enqueue_rollout("refreshes")
        await waiting(store, first.rollout_id)
        await store.update_resources("main", {"w": rs.ObjectResource(value=Weights(fault))}, policy_version=1)

        async def is_told() -> bool:
            spans = await store.query_spans(first.rollout_id, name="told")
            assert all(said in str(span.attributes["error"]) for span in spans)
            return len(spans) >= (2 if fault == "cannot be read" else 1)  # the runner asks again for what it had not

        if isolation == "process" or fault == "cannot be read":
            await until(is_told)
        await store.update_resources("main", weights(2), policy_version=2)
        second = await store.enqueue_rollout("x")
        ends = await store.wait_for_rollouts(rollout_ids=[first.rollout_id, second.rollout_id], timeout=30)
    assert [end.status for end in ends] == ["succeeded"] * 2, ends[0].attempt.error
    assert ends[0].reward == ends[1].reward


async def test_a_task_that_cannot_be_sent_to_a_process_leaves_it_as_it_was(make_memory_store: MakeMemoryStore) -> None:
    """Its rollout fails and says why; the next one has its resources, and the same process."""
    store = make_memory_store()
    await store.update_resources("main", weights(1), policy_version=1)
    async with rs.RunnerPool(store, told_of_weights, size=1, isolation="process"):
        ends = []
        for task in ("x", Weights("cannot be pickled again"), "x"):
            made = await store.enqueue_rollout(task, config=rs.RolloutConfig(max_attempts=1))
            ends.append(present(await store.wait_for_rollout(made.rollout_id, timeout=30)))
            await store.update_resources("main", weights(2), policy_version=2)
    assert [end.status for end in ends] == ["succeeded", "failed", "succeeded"]
    assert "cannot be pickled (OddError: there is a lock in it)" in str(present(ends[1].attempt.error))
    assert ends[0].reward == ends[2].reward


def told_of_weights(task: Any, ctx: rs.Context) -> float:
    """Checks that it has the weights that it is said to have; its process is its reward."""
    assert ctx.resources["w"].get() == ctx.policy_version
    return float(os.getpid())
