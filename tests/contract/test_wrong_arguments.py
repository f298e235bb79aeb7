"""Every public method with every kind of wrong value at every argument, from a table made of the signatures.

A named error or an answer; the store and its other clients unharmed; nothing changed by an error.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

import raystore as rs
from raystore.client.client import StoreClient
from raystore.core.snapshot import parts
from raystore.errors import StoreCorruptError, StoreError
from raystore.types.contract import LLM, EnqueueRolloutRequest, RolloutConfig
from raystore.types.spans import Event, Link, OtelResource, SpanContext, TraceStatus
from tests.helpers import make_span, until

METHODS = {
    name: inspect.signature(method)
    for name, method in inspect.getmembers(StoreClient, inspect.isfunction)
    if not name.startswith("_") and (inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method))
}

_numbers = itertools.count()


class Odd:
    """Something that no store knows, and that does not like to be looked at."""

    def __repr__(self) -> str:
        raise RuntimeError("no")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no")

    __hash__ = None  # type: ignore[assignment]


WRONG: list[Any] = [
    None, True, 3, -1, 2**70, 0.5, math.nan, math.inf, "", "x", "x" * 600, "x" * 200_000, "a\nb", "\ud800", b"x",
    object(), Odd(), [], [1], [None], [["x", "y"]], [Odd()], {}, {"x": 1}, {1: Odd()}, {"x"}, (), len, int, ..., 1j,
    np.float32("nan"), np.array([1.5, 2.0]), np.str_("x"), range(3), iter(["x"]),
    rs.RolloutConfig(), rs.Rollout(rollout_id="ro-other", input=1, start_time=0.0), EnqueueRolloutRequest(input=1),
    EnqueueRolloutRequest.model_construct(input=1), EnqueueRolloutRequest(input=1).model_copy(update={"mode": []}),
    rs.Span.model_construct(name="x"), rs.Batch.model_construct(consumer=3), rs.Batch.model_construct(),
    RolloutConfig.model_construct(max_attempts="x"),
]  # fmt: skip


class Known:
    """What a store holds for these calls to be about."""

    async def fill(self, store: Any) -> None:
        """Some rollouts, one of which runs and one of which is taken."""
        self.consumer = f"c-{next(_numbers)}"
        self.ids = [(await store.enqueue_rollout(n, group_id="g", tags={"k": 1})).rollout_id for n in range(3)]
        self.running = await store.start_attempt(self.ids[0], "w")
        await store.update_rollout(self.ids[1], status="succeeded")
        self.batch = await store.take(1, consumer=self.consumer)
        await store.update_resources("m", {"llm": LLM(endpoint="e", model="m")})

    def right(self, method: str) -> dict[str, Any]:
        """Arguments that are right, as many as can be given."""
        span = make_span(self.running, 1)
        values: dict[str, Any] = {
            "input": 1, "mode": "train", "resources_id": "m", "config": RolloutConfig(), "metadata": {"x": 1},
            "worker_id": "w", "rollout_id": self.running.rollout_id, "group_id": "g", "queue": "default", "priority": 1,
            "tags": {"k": 1}, "rollouts": [EnqueueRolloutRequest(input=1)], "n": 1, "timeout": 0.0,
            "queues": ["empty"], "limit": 1, "status_in": ["succeeded"], "rollout_id_in": [self.ids[0]],
            "rollout_id_contains": "r", "filter_logic": "and", "sort_by": None, "sort_order": "asc", "offset": 0,
            "rollout_ids": [self.ids[1]], "status": "running", "cursor": 0, "kinds": ["enqueued"],
            "state": {"turns": 3},
            "attempt_id": self.running.attempt.attempt_id, "last_heartbeat_time": 1.0,
            "rollout_attempt_ids": [(self.running.rollout_id, "a")], "span": span, "spans": [span],
            "readable_span": None, "sequence_id": 4, "allow_partial": True, "consumer": self.consumer,
            "batch": self.batch,
            "step": 5, "note": "n", "resources": {"llm": LLM(endpoint="e", model="m")}, "policy_version": 1,
            "version": 1, "heartbeat_stats": {"x": 1}, "outcome": None, "error": "e", "died": False, "session_id": "s",
            "stopped": False, "pool_id": "p", "failures": 3,
            "attempts": [(self.running.rollout_id, self.running.attempt.attempt_id)],
        }  # fmt: skip
        values |= {
            f"{name}_contains": "x"
            for name in ("trace_id", "span_id", "parent_id", "name", "worker_id", "resources_id")
        }
        values |= {"trace_id": "x", "span_id": "x", "parent_id": "x", "name": "x"}
        if method == "enqueue_rollout":
            values["rollout_id"] = "mine"
        if method == "query_rollouts":
            values["status"] = ["succeeded"]
        if method in ("enqueue_group", "enqueue_many_groups"):
            values |= {"n": 3, "min_size": 2, "spare": 1, "replace": 1, "deadline_seconds": 5.0}
            values |= {"group_id": f"g-{next(_numbers)}", "groups": [rs.EnqueueGroupRequest(input=1, n=2)]}
        if method == "query_groups":
            values |= {"status_in": ["open"], "group_id_in": ["g"]}
        if method == "take_groups":
            values["consumer"] = f"{self.consumer} of groups"
        if method == "query_workers":
            values["status_in"] = ["idle"]
        if method == "query_many_spans":
            values["attempt_id"] = "latest"
        return {name: values[name] for name in METHODS[method].parameters if name in values}


def values_for(known: Known, method: str, argument: str) -> list[Any]:
    """What is wrong there, or odd."""
    wrong = [*WRONG, known.running, known.batch, make_span(known.running)]
    if argument in ("span", "spans"):
        for field in type(make_span(known.running)).model_fields:
            for value in (None, "", 3, -1, True, math.nan, [], ["a"], {}, object(), 2**70, "a\nb"):
                span = make_span(known.running).model_copy(update={field: value})
                wrong.append(span if argument == "span" else [span])
        constructed = rs.Span.model_construct(name="x")
        wrong.append(constructed if argument == "span" else [constructed])
    if argument == "groups":
        for field in rs.EnqueueGroupRequest.model_fields:
            odd: list[Any] = [[], object(), "", 2**70, -1, math.nan]
            wrong += [[rs.EnqueueGroupRequest(input=1, n=2).model_copy(update={field: v})] for v in odd]
        wrong += [[rs.EnqueueGroupRequest.model_construct(input=1)], [rs.EnqueueGroupRequest.model_construct(n="x")]]
    if argument == "rollouts":
        for field in EnqueueRolloutRequest.model_fields:
            wrong += [[EnqueueRolloutRequest(input=1).model_copy(update={field: v})] for v in ([], object(), "", 2**70)]
    return wrong


async def outcome(store: Any, method: str, arguments: dict[str, Any]) -> Any:
    """What a call came to: an error, or None."""

    async def call() -> None:
        made = getattr(store, method)(**arguments)
        if inspect.isasyncgen(made):
            async for _ in made:
                pass
        else:
            await made

    try:
        await asyncio.wait_for(call(), 20.0 if "timeout" not in arguments else 0.1)
    except (TimeoutError, StoreError, ValidationError) as error:
        return error
    except (TypeError, ValueError) as error:
        assert any(name in str(error) for name in arguments), (method, arguments, error)
        return error
    return None


async def state_of(store: Any) -> Any:
    """All of a store in this process; of another the counts."""
    if hasattr(store, "_service"):
        return list(parts(store._service.state))
    counts = await store.statistics()
    return {
        name: n
        for name, n in counts.items()
        if name.startswith("total_") or name in ("changes", "queue_length", "waiters")
    }


def check(error: Any, known: Known, method: str, argument: str, value: Any) -> bool:
    """Whether a call was refused, in a way that tells its caller."""
    where = (method, argument, type(value))
    if error is None or isinstance(error, asyncio.TimeoutError):
        assert error is None or "timeout" in known.right(method), where
        return False
    assert not isinstance(error, StoreCorruptError), where
    assert type(error) is not StoreError, (where, error)
    assert len(str(error)) < 4_000 or isinstance(error, ValidationError), where
    return True


@pytest.mark.parametrize("method", sorted(METHODS))
async def test_every_wrong_argument(method: str) -> None:
    """The caller is told by name, or answered; nothing has changed when it was an error."""
    with rs.InMemoryLightningStore(clock="manual") as store:
        known = Known()
        await known.fill(store)
        for argument in known.right(method):
            before = await state_of(store)
            for value in values_for(known, method, argument):
                error = await outcome(store, method, known.right(method) | {argument: value})
                after = await state_of(store)
                if check(error, known, method, argument, value):
                    assert after == before, (method, argument, type(value), error)
                before = after
        await store.enqueue_rollout("still here")


@pytest.mark.timeout(300)
async def test_every_wrong_argument_through_an_actor(make_shared_store: Callable[..., rs.RayLightningStore]) -> None:
    """The same from another process, beside another client, all values at once; then those again that were refused."""
    store = make_shared_store(clock="manual")
    other = rs.RayLightningStore(store.actor)
    for method in sorted(METHODS):
        known = Known()
        await known.fill(store)

        async def refused(
            values: list[tuple[str, Any]] | list[Any], known: Known = known, method: str = method
        ) -> list[Any]:
            """Those of these (argument, value) that are refused."""
            calls = (outcome(store, method, known.right(method) | {argument: value}) for argument, value in values)
            errors = await asyncio.gather(*calls)
            return [tried for tried, e in zip(values, errors, strict=True) if check(e, known, method, *tried)]

        values = [(name, value) for name in known.right(method) for value in values_for(known, method, name)]
        values = await refused(values)

        async def nobody_waits() -> bool:  # any more: calls that gave up are withdrawn a moment later
            return (await store.statistics())["waiters"] == 0

        await until(nobody_waits)
        before = await state_of(store)
        if len(await refused(values)) == len(values):
            assert await state_of(store) == before, method
        await other.enqueue_rollout("still here")


BROKEN: dict[str, list[Any]] = {
    "status": [TraceStatus.model_construct(), "OK", None],
    "events": [5, [5], [Event.model_construct()], [None]],
    "links": [5, [Link.model_construct()], [Link.model_construct(context=SpanContext.model_construct())]],
    "resource": [None, OtelResource.model_construct(), {}],
    "context": [5, SpanContext.model_construct()],
    "parent": [5, SpanContext.model_construct()],
    "attributes": [None, [], 5],
}


@pytest.mark.parametrize("field", BROKEN)
async def test_what_is_stored_can_be_read(field: str) -> None:
    """A span that was changed or made without validation is refused, or stands in a trace that everybody can read."""
    with rs.InMemoryLightningStore(clock="manual") as store:
        claimed = await store.start_rollout(1)
        for value in BROKEN[field]:
            error = await outcome(store, "add_span", {"span": make_span(claimed).model_copy(update={field: value})})
            assert error is not None, value
        await store.add_span(make_span(claimed))
        assert len(await store.query_spans(claimed.rollout_id)) == 1
