"""Trying again: retry rules with backoff, and requeuing by hand."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

import raystore as rs
from raystore.errors import InvalidValueError
from tests.helpers import AnyStore, present, status_of, until


def rule(max_retries: int, seconds: float = 10.0, **more: Any) -> rs.RetryRule:
    """A rule without chance in it."""
    return rs.RetryRule(max_retries=max_retries, backoff_seconds=seconds, **{"jitter": 0.0, **more})


async def fail(store: AnyStore) -> rs.AttemptedRollout:
    """The next rollout is claimed, and its attempt fails."""
    claimed = present(await store.dequeue_rollout("w"))
    await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status="failed")
    return claimed


async def test_a_rule_tries_again_after_a_delay(store: AnyStore) -> None:
    """As often as it says, each time after twice the delay; a parked dequeue is answered when it is over."""
    made = await store.enqueue_rollout("x", config=rs.RolloutConfig(retry_rules={"agent_error": rule(2)}))
    assert made.config.retry_rules == {"agent_error": rule(2)}
    await fail(store)
    for seconds in (10, 20):
        assert await status_of(store, made) == "requeuing"
        waiting = asyncio.ensure_future(store.dequeue_rollout("w", timeout=600))

        async def is_parked() -> bool:
            return bool((await store.statistics())["waiters"])

        await until(is_parked)
        await store.testing.tick(seconds)
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await store.testing.tick(0.5)
        claimed = present(await waiting)
        await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status="failed")
    assert await status_of(store, made) == "failed"
    attempts = await store.query_attempts(made.rollout_id)
    assert [attempt.outcome for attempt in attempts] == ["agent_error"] * 3


async def test_what_backs_off_can_be_seen(store: AnyStore) -> None:
    """In the statistics, in its story, in the answer to why nothing goes on, and in the changes."""
    config = rs.RolloutConfig(timeout_seconds=5, retry_rules={"timeout": rule(1, 30)})
    made = await store.enqueue_rollout("x", config=config)
    await store.dequeue_rollout()
    await store.testing.tick(5.5)
    found = await store.statistics()
    assert (found["backing_off"], found["backing_off_by_queue"], found["held_back"]) == (1, {"default": 1}, 0)
    story = "\n".join(await store.story(made.rollout_id))
    assert "outcome=timeout retry=1 max_retries=1 seconds=30.0" in story
    assert f"Rollout {made.rollout_id} backs off for another 30.0 s after attempt 1 ended with outcome timeout" in story
    (binding, *_) = await store.why()
    assert binding.kind == "backing_off"
    assert binding.text.startswith("1 of 1 rollouts in queue 'default' back off after an attempt")
    await store.testing.tick(30.5)
    assert (await store.statistics())["backing_off"] == 0
    kinds = [change.kind for change in (await store.changes()).items if change.rollout_id == made.rollout_id]
    assert kinds == ["enqueued", "claimed", "requeuing", "backs_off", "backoff_over"]


async def test_a_default_configuration_with_rules(make_store: Callable[..., AnyStore]) -> None:
    """Rollouts that are enqueued without one have it; a configuration of their own stands instead of it."""
    config = rs.RolloutConfig(retry_rules={"agent_error": rule(1, 0.0), "infra": rule(0)})
    store = make_store(default_config=config)
    made = await store.enqueue_rollout("x")
    assert made.config == config
    other = await store.enqueue_rollout("y", config=rs.RolloutConfig())
    await fail(store)
    await fail(store)
    assert [await status_of(store, one) for one in (made, other)] == ["requeuing", "failed"]
    assert present(await store.dequeue_rollout()).rollout_id == made.rollout_id


async def test_a_configuration_with_rules_is_set_later(store: AnyStore) -> None:
    """And enqueued again under the same id it is the same content, in whatever order its rules are named."""
    made = await store.enqueue_rollout("x", rollout_id="mine")
    rules: dict[rs.RetryOutcome, rs.RetryRule] = {
        "timeout": rule(1),
        "agent_error": rule(3, 2.0, max_backoff_seconds=9),
    }
    changed = await store.update_rollout(made.rollout_id, config=rs.RolloutConfig(retry_rules=rules))
    assert changed.config.retry_rules == rules
    assert (await store.enqueue_rollout("x", rollout_id="mine")).rollout_id == "mine"
    await store.enqueue_rollout("y", rollout_id="ruled", config=rs.RolloutConfig(retry_rules=rules))
    again = rs.RolloutConfig(retry_rules=dict(reversed(rules.items())))
    assert (await store.enqueue_rollout("y", rollout_id="ruled", config=again)).rollout_id == "ruled"
    with pytest.raises(rs.ConflictError, match="config differ"):
        await store.enqueue_rollout("y", rollout_id="ruled", config=rs.RolloutConfig())


async def test_requeue_in_place(store: AnyStore) -> None:
    """It waits again with its attempts and spans, and whoever waits for it waits again."""
    made = await store.enqueue_rollout("x", config=rs.RolloutConfig(max_attempts=2, retry_condition=["failed"]))
    await fail(store)
    await fail(store)
    (again,) = await store.requeue([made.rollout_id])
    assert (again.rollout_id, again.status, again.end_time, again.requeued_from) == (
        made.rollout_id, "requeuing", None, None,
    )  # fmt: skip
    assert again.attempt.sequence_id == 2
    assert await store.wait_for_rollouts(rollout_ids=[made.rollout_id], timeout=0) == []
    assert store.sync.requeue([made.rollout_id]) == [again]
    await fail(store)
    assert await status_of(store, made) == "requeuing"
    await fail(store)
    assert await status_of(store, made) == "failed"
    assert len(await store.query_attempts(made.rollout_id)) == 4


async def test_requeue_of_what_was_trained_on(store: AnyStore) -> None:
    """A new rollout names the old one, which the consumer keeps as it took it."""
    made = await store.enqueue_rollout({"task": 1}, tags={"k": "v"}, metadata={"m": 2}, queue="q")
    claimed = present(await store.dequeue_rollout(queues=["q"]))
    await store.update_attempt(claimed.rollout_id, "latest", status="failed")
    batch = await store.take(1, consumer="trainer", status_in=["failed"])
    (new,) = await store.requeue([made.rollout_id])
    assert type(new) is rs.Rollout
    assert (new.requeued_from, new.status, new.input, new.tags, new.metadata, new.queue) == (
        made.rollout_id, "queuing", {"task": 1}, {"k": "v"}, {"m": 2}, "q",
    )  # fmt: skip
    assert await store.requeue([made.rollout_id]) == [new]
    await store.ack(batch, step=1)
    assert await status_of(store, made) == "failed"
    got = present(await store.dequeue_rollout(queues=["q"]))
    assert (got.rollout_id, got.requeued_from, got.attempt.sequence_id) == (new.rollout_id, made.rollout_id, 1)
    assert await store.dequeue_rollout(queues=["q"]) is None


async def test_requeue_all_or_none(make_store: Callable[..., AnyStore]) -> None:
    """Whatever refuses one of them refuses all; the error names it and says what to do."""
    store = make_store(max_queued=2)
    failed = [await store.enqueue_rollout(0)]
    await fail(store)
    for number in (1, 2):
        failed.append(await store.enqueue_rollout(number))
        await fail(store)
    done = await store.start_rollout("done")
    await store.update_attempt(done.rollout_id, done.attempt.attempt_id, status="succeeded")
    ids = [rollout.rollout_id for rollout in failed]
    with pytest.raises(rs.RolloutNotFoundError, match="ro-unknown"):
        await store.requeue([ids[0], "ro-unknown"])
    with pytest.raises(rs.RolloutSucceededError, match=f"{done.rollout_id} has succeeded.*leave it out"):
        await store.requeue([ids[0], done.rollout_id])
    with pytest.raises(rs.OverloadedError):
        await store.requeue(ids)
    assert {await status_of(store, rollout) for rollout in failed} == {"failed"}
    assert await store.requeue([]) == []
    assert [rollout.rollout_id for rollout in await store.requeue(ids[1:])] == ids[1:]


async def test_requeue_of_many(store: AnyStore) -> None:
    """A thousand with large inputs come back in parts."""
    requests = [rs.EnqueueRolloutRequest(input="x" * 2_000) for _ in range(1_000)]
    made = await store.enqueue_many_rollouts(requests)
    ids = [rollout.rollout_id for rollout in made]
    await store.cancel_rollouts(ids)
    again = await store.requeue(ids)
    assert [rollout.rollout_id for rollout in again] == ids
    assert {(rollout.status, rollout.input) for rollout in again} == {("requeuing", "x" * 2_000)}


WRONG_RULES: list[tuple[Any, str]] = [
    ({"dropped": {"max_retries": 1}}, "retry_rules.dropped.*'agent_error', 'timeout', 'unresponsive', 'infra'"),
    ({"timeout": {}}, "retry_rules.timeout.max_retries"),
    ({"timeout": {"max_retries": -1}}, "retry_rules.timeout.max_retries.*greater than or equal to 0.*-1"),
    ({"timeout": {"max_retries": 1_001}}, "less than or equal to 1000.*1001"),
    ({"timeout": {"max_retries": 1.5}}, "max_retries.*1.5"),
    ({"timeout": {"max_retries": 1, "backoff_seconds": -2}}, "backoff_seconds.*-2"),
    ({"timeout": {"max_retries": 1, "backoff_seconds": math.inf}}, "backoff_seconds.*inf"),
    ({"timeout": {"max_retries": 1, "backoff_seconds": math.nan}}, "backoff_seconds.*nan"),
    ({"timeout": {"max_retries": 1, "factor": 0.5}}, "factor.*greater than or equal to 1.*0.5"),
    ({"timeout": {"max_retries": 1, "jitter": 1.1}}, "jitter.*less than or equal to 1.*1.1"),
    ({"timeout": {"max_retries": 1, "backoff_seconds": 9, "max_backoff_seconds": 3}}, "3.0 is below backoff_seconds=9"),
    ({"timeout": {"max_retries": 1, "seconds": 3}}, "seconds.*backoff_seconds"),
    ({"timeout": 3}, "retry_rules.timeout.*3"),
    ("timeout", "retry_rules.*timeout"),
    (None, "retry_rules.*None"),
]


@pytest.mark.parametrize(("rules", "named"), WRONG_RULES, ids=str)
def test_a_wrong_rule_is_named(rules: Any, named: str) -> None:
    """Where it is made."""
    with pytest.raises(ValidationError, match="(?s)" + named):
        rs.RolloutConfig(retry_rules=rules)


async def test_a_rule_that_was_changed_is_checked_again(store: AnyStore) -> None:
    """Assignment is not validated; what travels is."""
    config = rs.RolloutConfig(retry_rules={"infra": rule(1)})
    config.retry_rules["infra"].max_retries = -4
    with pytest.raises(InvalidValueError, match=r"config.retry_rules\['infra'\].max_retries=-4"):
        await store.enqueue_rollout("x", config=config)
    config.retry_rules["infra"] = rule(1, 5.0)
    config.retry_rules["infra"].max_backoff_seconds = 1.0
    with pytest.raises(InvalidValueError, match=r"config.retry_rules\['infra'\].*max_backoff_seconds=1.0 is below"):
        await store.enqueue_rollout("x", config=config)
    assert list(await store.query_rollouts()) == []


WRONG_IDS: list[tuple[Any, str]] = [
    ("ro-1", r"rollout_ids='ro-1'.*\['ro-1'\]"),
    (None, "rollout_ids=None.*a list of ids"),
    (["ro-1", ""], r"rollout_ids\[1\]=''"),
    ([3], r"rollout_ids\[0\]=3"),
    (["ro-1"] * 10_001, "rollout_ids=.*at most 10,000 ids"),
]


@pytest.mark.parametrize(("ids", "named"), WRONG_IDS, ids=lambda one: str(one)[:20])
async def test_wrong_ids_are_named(store: AnyStore, ids: Any, named: str) -> None:
    """The error says the value and what was expected."""
    with pytest.raises(InvalidValueError, match=named):
        await store.requeue(ids)
