"""Stores with feeds, and rollouts that are run by hand, so that a test decides how each of them ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest

import raystore as rs
from raystore import semconv
from tests.contract.conftest import actors as actors  # a fixture, like the next
from tests.contract.conftest import make_shared_store as make_shared_store
from tests.helpers import AnyStore, make_span

#: Ends a rollout: takes it, and gives its reward, or raises. It may be a coroutine function.
Agent = Callable[[Any], Any]

RIGHT: dict[str, Any] = {"resources_id": "policy", "size": 2, "batch": 2}  #: arguments of a small feed


@pytest.fixture(params=["memory", "ray"])
def store(request: pytest.FixtureRequest) -> AnyStore:
    """A store of each kind."""
    make = request.getfixturevalue("make_shared_store" if request.param == "ray" else "make_memory_store")
    made: AnyStore = make()
    return made


def spans_of(rollout: Any, reward: float | None, **named: float) -> list[rs.Span]:
    """A model call with what training needs, and rewards."""
    call: dict[str, Any] = {
        semconv.OPERATION: "chat", semconv.INPUT_TOKEN_IDS: [1, 2, 3], semconv.OUTPUT_TOKEN_IDS: [4, 5],
        semconv.OUTPUT_LOGPROBS: [-0.1, -0.2],
    }  # fmt: skip
    found = [make_span(rollout, 0, name="chat", attributes=call)]
    if reward is not None:
        rewards: dict[str, Any] = {}
        for number, (name, value) in enumerate([("reward", reward), *named.items()]):
            rewards[f"{semconv.REWARD_PREFIX}{number}.name"] = name
            rewards[f"{semconv.REWARD_PREFIX}{number}.value"] = value
        found.append(make_span(rollout, 0, name=semconv.REWARD_SPAN, attributes=rewards))
    return found


class Failed(Exception):
    """Raised by an agent of a test: its attempt fails so."""

    def __init__(self, outcome: Any = "agent_error") -> None:
        self.outcome = outcome


async def finish(store: AnyStore, rollout: Any, agent: Agent) -> None:
    """End one rollout as the agent says; what it gives may be a reward, or spans."""
    ids = (rollout.rollout_id, rollout.attempt.attempt_id)
    try:
        answer = agent(rollout)
        if asyncio.iscoroutine(answer):
            answer = await answer
    except Failed as error:
        await store.finish_attempt(*ids, [], "failed", outcome=error.outcome, error=f"it {error.outcome}")
        return
    spans = answer if isinstance(answer, list) else spans_of(rollout, answer)
    with contextlib.suppress(ValueError):  # cancelled meanwhile
        await store.finish_attempt(*ids, spans, "succeeded")


@contextlib.asynccontextmanager
async def running(store: AnyStore, agent: Agent, *, queue: str = "default") -> AsyncIterator[None]:
    """Run what the store hands out, all of it at once."""
    tasks: set[asyncio.Task[None]] = set()

    async def claim() -> None:
        while True:
            for rollout in await store.dequeue_many_rollouts(limit=16, timeout=30, queues=[queue]):
                task = asyncio.ensure_future(finish(store, rollout, agent))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

    claiming = asyncio.ensure_future(claim())
    try:
        yield
    finally:
        for task in (claiming, *tasks):
            task.cancel()
        results = await asyncio.gather(claiming, *tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, (rs.StoreClosedError, asyncio.CancelledError)):
                raise result


async def trained(
    feed: rs.Feed, *, keep: Any = None, steps: int | None = None, after: Callable[[Any], Any] | None = None
) -> list[list[rs.FeedGroup]]:
    """Run the loop of a trainer for so many steps, or to the end; the groups of each step."""
    found: list[list[rs.FeedGroup]] = []
    start = 0
    await feed.publish([0.0], version=start)
    async for batch in feed.batches(keep=keep):
        found.append(batch.groups)
        step = len(found)
        if after is not None:
            answer = after(batch)
            if asyncio.iscoroutine(answer):
                await answer
        await feed.publish([float(step)], version=step)
        await batch.ack(step=step)
        if step == steps:
            break
    return found


@pytest.fixture
def within() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Coroutine[Any, Any, Any]]]:
    """Waits for something that must not take long."""
    yield lambda coroutine: asyncio.wait_for(coroutine, 30)
