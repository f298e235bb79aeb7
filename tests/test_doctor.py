"""The doctor: a prepared store for each thing that it looks for, and a healthy run, of which it says nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import raystore as rs
from raystore import semconv
from raystore.cli import doctor
from raystore.cli.doctor import CHECKS, COSTLY, ODD, WRONG, examine
from tests.conftest import MakeMemoryStore
from tests.helpers import make_span, present

Store = rs.InMemoryLightningStore


def call(*, ids: bool = True, logprobs: bool = True, reason: str = "stop", tools: list[Any] | None = None) -> Any:
    """Attributes of a model call."""
    found: dict[str, Any] = {semconv.OPERATION: "chat", f"{semconv.FINISH_REASONS}.0": reason}
    if ids:
        found |= {semconv.INPUT_TOKEN_IDS: [1, 2], semconv.OUTPUT_TOKEN_IDS: [3, 4]}
    if ids and logprobs:
        found[semconv.OUTPUT_LOGPROBS] = [-0.1, -0.2]
    if tools is not None:
        parts = [{"type": "tool_call", "id": "c", **tool} for tool in tools]
        found[semconv.OUTPUT_MESSAGES] = json.dumps([{"role": "assistant", "parts": parts, "finish_reason": reason}])
    return found


async def ran(
    store: Store, *calls: Any, reward: float | None = 1.0, status: Any = "succeeded", skew: float = 0.0, **request: Any
) -> str:
    """A rollout that has ended, with these model calls."""
    made = await store.enqueue_rollout("x", **request)
    claimed = present(await store.dequeue_rollout("worker"))
    now = claimed.attempt.start_time + skew
    spans = [
        make_span(claimed, 0, name="chat", attributes=attributes, start_time=now, end_time=now + 0.1)
        for attributes in calls
    ]
    if reward is not None:
        attributes = {f"{semconv.REWARD_PREFIX}0.value": reward}
        spans.append(make_span(claimed, 0, name=semconv.REWARD_SPAN, attributes=attributes))
    await store.finish_attempt(made.rollout_id, claimed.attempt.attempt_id, spans, status)
    return made.rollout_id


async def no_reward(store: Store) -> str:
    await ran(store, call())
    return await ran(store, call(), reward=None)


async def no_model_call(store: Store) -> str:
    await ran(store, call())
    return await ran(store)


async def without_token_ids(store: Store) -> str:
    await ran(store, call())
    return await ran(store, call(ids=False), call())


async def without_logprobs(store: Store) -> str:
    return await ran(store, call(logprobs=False))


async def truncated(store: Store) -> str:
    await ran(store, call(), call())
    return await ran(store, call(reason="length"), call())


async def bad_tool_calls(store: Store) -> str:
    good = {"name": "search", "arguments": {"q": "x"}}
    await ran(store, call(reason="tool_calls", tools=[good, good]), tags={"env": "math"})
    bad = [{"name": "", "arguments": {}}, {"name": "search", "arguments": "{'q': "}, good]
    return await ran(store, call(reason="tool_calls", tools=bad), tags={"env": "code\x1b"})


async def equal_rewards(store: Store) -> str:
    rollouts = await store.enqueue_group("x", 2, group_id="g")
    for rollout in rollouts:
        claimed = present(await store.dequeue_rollout("worker"))
        spans = [
            make_span(claimed, 0, name="chat", attributes=call()),
            make_span(claimed, 0, name=semconv.REWARD_SPAN, attributes={f"{semconv.REWARD_PREFIX}0.value": 0.5}),
        ]
        await store.finish_attempt(rollout.rollout_id, claimed.attempt.attempt_id, spans, "succeeded")
    return rollouts[0].rollout_id


async def resources_missing(store: Store) -> str:
    return await ran(store, call(), resources_id="policy")


async def clock_skew(store: Store) -> str:
    await ran(store, call())
    await ran(store, call(), skew=-30)
    return await ran(store, call(), skew=-90)


async def no_retry_condition(store: Store) -> str:
    return await ran(store, call(), config=rs.RolloutConfig(max_attempts=3, retry_condition=[]))


async def never_polled(store: Store) -> str:
    await ran(store, call())
    await store.update_worker("runner-1", {"pid": 1})
    return ""


async def memory_high(store: Store) -> str:
    await ran(store, call(), call() | {"text": "x" * 900_000})
    return ""


async def spans_evicted(store: Store) -> str:
    first = await ran(store, call(), call() | {"text": "x" * 600_000})
    await store.release([first])
    await ran(store, call(), call() | {"text": "x" * 600_000})
    await store.delete_rollouts([(await store.query_rollouts(sort_by="start_time", sort_order="desc"))[0].rollout_id])
    return first


#: What makes a store ill, and how many of how many that is.
ILLNESSES: dict[Callable[[Store], Any], tuple[int, int]] = {
    no_reward: (1, 2), no_model_call: (1, 2), without_token_ids: (1, 3), without_logprobs: (1, 1), truncated: (1, 4),
    bad_tool_calls: (2, 3), equal_rewards: (1, 1), resources_missing: (1, 1), clock_skew: (2, 3),
    no_retry_condition: (1, 1), never_polled: (1, 2), memory_high: (0, 0), spans_evicted: (1, 1),
}  # fmt: skip


@pytest.fixture
def store(make_memory_store: MakeMemoryStore) -> Store:
    """With room for little."""
    return make_memory_store(eviction_memory_threshold=1_000_000, safe_memory_threshold=900_000)


@pytest.mark.parametrize("ill", ILLNESSES, ids=lambda ill: ill.__name__)
async def test_each_illness_is_found(store: Store, ill: Callable[[Store], Any]) -> None:
    """Alone, with its number, its share, one rollout as an example, and a remedy."""
    example = await ill(store)
    (found,) = await examine(store)
    assert found.kind == ill.__name__ and found.remedy == CHECKS[found.kind].kind.remedy
    number, among = ILLNESSES[ill]
    if among:
        assert (found.evidence["count"], found.evidence["of"]) == (number, among), found
        assert found.evidence["share"] == number / among and f"{number} of {among} (" in found.text
    if example:
        assert found.evidence["example"] == example
        if found.kind != "equal_rewards":  # which one member alone does not show
            assert example in found.text
            assert [one.kind for one in await examine(store, example)] == [found.kind]
    assert found.text.isprintable() and found.text.endswith(".")


def test_there_is_an_illness_for_each_check() -> None:
    """Also for one that is added; and each has a severity."""
    assert {ill.__name__ for ill in ILLNESSES} == CHECKS.keys()
    assert {check.severity for check in CHECKS.values()} == {WRONG, COSTLY, ODD}


async def test_a_queue_that_nobody_serves_comes_first(store: Store) -> None:
    """As `store.why` tells it."""
    await no_reward(store)
    await store.enqueue_rollout("x", queue="maht")
    told = await examine(store)
    assert [one.kind for one in told] == ["unserved_queue", "no_reward"] and "'maht'" in told[0].text


async def test_findings_are_in_the_order_of_severity_and_share(store: Store) -> None:
    """What spoils the training first; of that, what is commonest."""
    for ill in (clock_skew, no_retry_condition, truncated, no_model_call, without_token_ids, no_reward):
        await ill(store)
    told = await examine(store)
    order = [(CHECKS[one.kind].severity, -one.evidence["share"]) for one in told]
    assert order == sorted(order) and len(told) == 6
    assert [one.kind for one in told][-1] == "clock_skew"


async def test_a_healthy_run_has_no_findings(make_memory_store: MakeMemoryStore) -> None:
    """A pool that trains on groups with rewards, tokens and tools."""
    store = make_memory_store()
    await store.update_resources("policy", {"prompt": rs.PromptTemplate(template="{q}", engine="f-string")})

    def agent(task: int, ctx: rs.Context) -> float:
        ctx.llm(prompt_ids=[1, 2], response_ids=[3], logprobs=[-0.5], finish_reason="stop")
        return float(hash(ctx.rollout.rollout_id) % 1_000)

    async with rs.RunnerPool(store, agent, size=2):
        made = [one for n in range(4) for one in await store.enqueue_group(n, 4, resources_id="policy")]
        await store.wait_for_rollouts(rollout_ids=[one.rollout_id for one in made], timeout=60)
        assert await examine(store) == []


async def test_the_rollouts_that_were_enqueued_last_are_read_by_pages(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as were asked for; those that wait are passed over, however many."""
    monkeypatch.setattr(doctor, "PAGE", 2)
    await no_reward(store)
    for _ in range(5):
        await ran(store, call())
    for number in range(20):
        await store.enqueue_rollout(number)
    assert await examine(store, limit=5) == []
    (found,) = await examine(store, limit=6)
    assert (found.kind, found.evidence["of"]) == ("no_reward", 6)
    (found,) = await examine(store)
    assert found.evidence["of"] == 7


async def test_one_rollout_alone_is_examined(store: Store) -> None:
    """Whatever ails others; an unknown one, and a limit that is none, are refused."""
    ill = await no_reward(store)
    well = await ran(store, call())
    assert await examine(store, well) == []
    (found,) = await examine(store, ill)
    assert found.kind == "no_reward" and found.text.startswith("1 of 1 (100%) rollouts that succeeded have no reward")
    with pytest.raises(rs.RolloutNotFoundError, match="nope"):
        await examine(store, "nope")
    with pytest.raises(rs.InvalidValueError, match="limit=0"):
        await examine(store, limit=0)


async def test_a_recovered_run_is_examined_alike(make_memory_store: MakeMemoryStore, tmp_path: Any) -> None:
    """Of what only its processes knew, nothing is said."""
    store = make_memory_store(journal=tmp_path / "j")
    await no_reward(store)
    await store.enqueue_rollout("x", queue="nobody's")
    store.close()
    run = rs.recover(tmp_path / "j")
    try:
        assert [one.kind for one in await examine(run)] == ["no_reward"]
    finally:
        run.close()
