"""Bad input: a clear error that names the value, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from pydantic import ValidationError

from raystore.errors import InvalidValueError
from raystore.types.contract import EnqueueRolloutRequest, RolloutConfig
from tests.helpers import AnyStore


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"mode": "prod"}, InvalidValueError, "prod"),
        ({"config": {"timeout": 60}}, InvalidValueError, "timeout"),
        ({"rollout_id": ""}, ValueError, "rollout_id"),
        ({"rollout_id": "a\nb"}, ValueError, "rollout_id"),
        ({"rollout_id": "x" * 513}, ValueError, "rollout_id"),
        ({"queue": ""}, ValueError, "queue"),
        ({"group_id": "\x00"}, ValueError, "group_id"),
        ({"tags": {"a": None}}, ValueError, "tags"),
        ({"tags": {"a": float("nan")}}, ValueError, "tags"),
        ({"tags": {"a": [1]}}, ValueError, "tags"),
        ({"tags": {str(i): i for i in range(17)}}, ValueError, "tags"),
        ({"tags": ["a"]}, ValueError, "tags"),
        ({"metadata": [1]}, ValueError, "metadata"),
        ({"priority": "high"}, InvalidValueError, "priority"),
    ],
    ids=str,
)
async def test_enqueue_refuses(
    store: AnyStore, arguments: Any, error: type[InvalidValueError] | type[ValueError], named: str
) -> None:
    """A bad argument is named and nothing is enqueued, also in bulk."""
    with pytest.raises(error, match=named):
        await store.enqueue_rollout("x", **arguments)
    assert (await store.statistics())["total_rollouts"] == 0


async def test_bulk_enqueue_is_validated_as_a_whole(store: AnyStore) -> None:
    """One bad request refuses all of them."""
    good = EnqueueRolloutRequest(input=1)
    with pytest.raises(InvalidValueError):
        await store.enqueue_many_rollouts([good, "bad"])  # type: ignore[list-item]  # wrong on purpose
    with pytest.raises(ValueError, match="rollout_id='twice'"):
        await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=i, rollout_id="twice") for i in range(2)])
    with pytest.raises(ValueError, match="n=0"):
        await store.enqueue_group("x", 0)
    assert (await store.statistics())["total_rollouts"] == 0


@pytest.mark.parametrize(
    "bad", [{"timeout_seconds": float("nan")}, {"unresponsive_seconds": -1}, {"max_attempts": 0}], ids=str
)
async def test_config_refuses(store: AnyStore, bad: dict[str, float] | dict[str, int]) -> None:
    """A configuration with a value that is no duration or no count cannot be made, nor smuggled in later."""
    with pytest.raises(ValidationError):
        RolloutConfig(**bad)
    config = RolloutConfig()
    name, value = next(iter(bad.items()))
    object.__setattr__(config, "__dict__", config.__dict__ | {name: value})
    with pytest.raises(InvalidValueError):
        await store.enqueue_rollout("x", config=config)


async def test_unknown_retry_condition(store: AnyStore) -> None:
    """Only attempt statuses can be retried."""
    with pytest.raises(InvalidValueError, match="retry_condition"):
        await store.enqueue_rollout("x", config={"retry_condition": ["queuing"]})  # type: ignore[arg-type]


async def test_requests_refuse_fields_that_do_not_exist(store: AnyStore) -> None:
    """A misspelt field would otherwise be dropped in silence."""
    with pytest.raises(ValidationError, match="moode"):
        EnqueueRolloutRequest(input=1, moode="train")  # type: ignore[call-arg]  # wrong on purpose


async def test_rollouts_are_no_ids(store: AnyStore) -> None:
    """The likeliest mistake gets a hint."""
    rollout = await store.enqueue_rollout("x")
    with pytest.raises(ValueError, match="pass its rollout_id"):
        await store.wait_for_rollouts(rollout_ids=[rollout], timeout=0)  # type: ignore[list-item]
    with pytest.raises(InvalidValueError):
        await store.update_resources("m", 5)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(ValueError, match="at least one name of a queue"):
        await store.dequeue_rollout(queues=[])


async def test_a_text_is_no_list_of_ids(store: AnyStore) -> None:
    """A single id where a list is expected would otherwise be taken letter by letter."""
    for call in (
        store.release("ro-1"), store.delete_rollouts("ro-1"), store.query_rollouts(rollout_id_in="ro-1"),
        store.query_many_spans("ro-1"), store.dequeue_rollout(queues="default"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="a list of ids"):
            await call


@pytest.mark.parametrize(
    "option",
    [
        {"duplicate_spans": "maybe"}, {"on_memory_full": "crash"}, {"clock": "sun"}, {"max_deliveries": 0},
        {"suspect_patience_seconds": -1}, {"suspect_patience_seconds": float("nan")},
        {"suspect_patience_seconds": "10"},
        {"max_queued": 0}, {"keep_resources": 0}, {"retention": {"max_age": 1}}, {"retention": -1},
        {"limits": {"value": 1}}, {"limits": {"value_bytes": 0}},
    ],
    ids=str,
)  # fmt: skip
async def test_store_options_are_checked(
    make_store: Callable[..., AnyStore],
    option: dict[str, str] | dict[str, int] | dict[str, float] | dict[str, dict[str, int]],
) -> None:
    """A bad option is named before anything is made."""
    with pytest.raises(ValueError, match=next(iter(option))):
        make_store(**option)


async def test_capabilities(store: AnyStore) -> None:
    """What the store allows; there is no OTLP endpoint."""
    assert store.capabilities == {"thread_safe": True, "async_safe": True, "zero_copy": False, "otlp_traces": False}
    with pytest.raises(NotImplementedError):
        store.otlp_traces_endpoint()


async def test_statistics(store: AnyStore) -> None:
    """Counts, and an uptime that grows."""
    first: Mapping[str, Any] = await store.statistics()
    assert first["name"] == type(store).__name__
    assert [first[f"total_{what}"] for what in ("rollouts", "attempts", "spans", "resources", "workers")] == [0] * 5
    assert (await store.statistics())["uptime"] > first["uptime"]


async def test_a_store_is_true_and_has_no_length(store: AnyStore) -> None:
    """Code that asks `if store` gets yes, whatever the store holds."""
    assert store
    assert not hasattr(store, "__len__")
