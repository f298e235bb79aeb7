"""Agents that switch to newer weights while they run, and what is kept of it."""

from __future__ import annotations

import asyncio
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
