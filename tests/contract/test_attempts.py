"""Attempts: reports, what follows for the rollout, retries, late reports."""

from __future__ import annotations

from typing import Any

import pytest

import raystore as rs
from tests.helpers import AnyStore, claim, make_span, present, status_of

RETRY: dict[str, Any] = {"max_attempts": 3, "retry_condition": ["failed", "timeout", "unresponsive"]}


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("preparing", "preparing"),
        ("running", "running"),
        ("succeeded", "succeeded"),
        ("failed", "failed"),
        ("timeout", "failed"),
        ("unresponsive", "failed"),
    ],
)
async def test_rollout_follows_its_latest_attempt(store: AnyStore, status: rs.AttemptStatus, expected: str) -> None:
    """Without a retry condition a failure of any kind fails the rollout."""
    rollout = await claim(store)
    await store.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status=status)
    assert await status_of(store, rollout) == expected


@pytest.mark.parametrize("status", ["failed", "timeout", "unresponsive"])
async def test_retry_until_max_attempts(store: AnyStore, status: rs.AttemptStatus) -> None:
    """A status in the retry condition queues the rollout until the attempts are used up."""
    rollout = await claim(store, **RETRY)
    for _ in range(2):
        await store.update_attempt(rollout.rollout_id, "latest", status=status)
        assert await status_of(store, rollout) == "requeuing"
        assert await store.dequeue_rollout() is not None
    await store.update_attempt(rollout.rollout_id, "latest", status=status)
    assert await status_of(store, rollout) == "failed"


async def test_attempts_started_by_hand_use_up_the_budget(store: AnyStore) -> None:
    """As in the reference, `start_attempt` ignores `max_attempts` and counts towards it."""
    rollout = await claim(store, max_attempts=2, retry_condition=["failed"])
    await store.start_attempt(rollout.rollout_id)
    await store.start_attempt(rollout.rollout_id)
    await store.update_attempt(rollout.rollout_id, "latest", status="failed")
    assert await status_of(store, rollout) == "failed"


async def test_end_times(store: AnyStore) -> None:
    """succeeded and failed stamp the attempt's end, timeout does not; the rollout ends no earlier than its attempt."""
    rollout = await claim(store)
    store.testing.tick(3)
    attempt = await store.update_attempt(rollout.rollout_id, "latest", status="succeeded")
    ended = await store.get_rollout_by_id(rollout.rollout_id)
    assert attempt.end_time == rollout.attempt.start_time + 3
    assert present(ended.end_time) >= present(attempt.end_time)
    other = await claim(store)
    assert (await store.update_attempt(other.rollout_id, "latest", status="timeout")).end_time is None


async def test_only_what_is_set_changes(store: AnyStore) -> None:
    """Metadata, worker and heartbeat change alone, and do not move the rollout."""
    rollout = await claim(store)
    await store.update_attempt(rollout.rollout_id, "latest", status="running")
    await store.update_attempt(rollout.rollout_id, "latest", status="succeeded")
    before = await store.get_rollout_by_id(rollout.rollout_id)
    store.testing.tick(9)
    attempt = await store.update_attempt(rollout.rollout_id, "latest", metadata={"x": 1}, last_heartbeat_time=5.0)
    assert (attempt.metadata, attempt.last_heartbeat_time, attempt.status) == ({"x": 1}, 5.0, "succeeded")
    assert (await store.get_rollout_by_id(rollout.rollout_id)).end_time == before.end_time
    assert (await store.update_attempt(rollout.rollout_id, "latest", metadata=None)).metadata is None
    assert (await store.update_attempt(rollout.rollout_id, "latest", worker_id=None)).worker_id is None


async def test_errors_of_update_attempt(store: AnyStore) -> None:
    """Each thing that is missing is named in the reference's words."""
    with pytest.raises(rs.RolloutNotFoundError, match="Rollout nope not found"):
        await store.update_attempt("nope", "latest", status="running")
    waiting = await store.enqueue_rollout("x")
    for attempt_id in ("latest", "at-nope"):
        with pytest.raises(ValueError, match=f"No attempts found for rollout {waiting.rollout_id}"):
            await store.update_attempt(waiting.rollout_id, attempt_id, status="running")
    await store.dequeue_rollout()
    with pytest.raises(rs.AttemptNotFoundError, match="Attempt at-nope not found for rollout"):
        await store.update_attempt(waiting.rollout_id, "at-nope", status="running")
    with pytest.raises(rs.InvalidValueError):
        await store.update_attempt(waiting.rollout_id, "latest", status="queuing", metadata={"x": 1})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="last_heartbeat_time"):
        await store.update_attempt(waiting.rollout_id, "latest", last_heartbeat_time=float("nan"))
    assert present(await store.get_latest_attempt(waiting.rollout_id)).metadata is None


async def test_errors_of_start_attempt(store: AnyStore) -> None:
    """Starting an attempt needs a rollout."""
    with pytest.raises(ValueError, match="not found"):
        await store.start_attempt("nope")


async def test_start_attempt_from_a_finished_rollout(store: AnyStore) -> None:
    """A finished rollout can be tried again; it is no longer finished then."""
    rollout = await claim(store)
    await store.update_attempt(rollout.rollout_id, "latest", status="failed")
    again = await store.start_attempt(rollout.rollout_id)
    assert (again.status, again.end_time, again.attempt.sequence_id) == ("preparing", None, 2)


async def test_start_attempt_supersedes_what_runs(store: AnyStore) -> None:
    """The attempt that ran keeps its status and says that it was superseded; its late reports mark only itself."""
    rollout = await claim(store)
    await store.add_span(make_span(rollout))
    await store.start_attempt(rollout.rollout_id)
    old, new = await store.query_attempts(rollout.rollout_id)
    assert (old.status, old.outcome, new.status, new.outcome) == ("running", "superseded", "preparing", None)
    await store.update_attempt(rollout.rollout_id, old.attempt_id, status="succeeded")
    await store.add_span(make_span(rollout, 2))
    assert await status_of(store, rollout) == "preparing"
    assert (await store.query_attempts(rollout.rollout_id))[0].status == "succeeded"


async def test_late_success_wins_and_withdraws_the_retry(store: AnyStore) -> None:
    """A success after a failure that waits for its retry ends the rollout; the retry is not handed out."""
    rollout = await claim(store, **RETRY)
    await store.update_attempt(rollout.rollout_id, "latest", status="timeout")
    assert await status_of(store, rollout) == "requeuing"
    await store.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status="succeeded")
    assert await status_of(store, rollout) == "succeeded"
    assert await store.dequeue_rollout() is None


async def test_late_success_of_a_superseded_attempt_marks_only_itself(store: AnyStore) -> None:
    """Once the retry is claimed, the old attempt decides nothing."""
    rollout = await claim(store, **RETRY)
    await store.update_attempt(rollout.rollout_id, "latest", status="timeout")
    await store.dequeue_rollout()
    await store.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status="succeeded")
    assert await status_of(store, rollout) == "preparing"


async def test_query_attempts(store: AnyStore) -> None:
    """By sequence id; pages and sorts; unknown rollouts have none."""
    rollout = await claim(store)
    for _ in range(3):
        await store.start_attempt(rollout.rollout_id)
    assert [a.sequence_id for a in await store.query_attempts(rollout.rollout_id)] == [1, 2, 3, 4]
    page = await store.query_attempts(rollout.rollout_id, sort_order="desc", limit=2)
    assert ([a.sequence_id for a in page], page.total) == ([4, 3], 4)
    assert await store.query_attempts("nope") == []
    assert present(await store.get_latest_attempt(rollout.rollout_id)).sequence_id == 4
    assert await store.get_latest_attempt("nope") is None


async def test_outcomes_say_why_an_attempt_ended(store: AnyStore) -> None:
    """The store fills in an outcome where the report only gives a status."""
    outcomes = {}
    for status in ("succeeded", "failed", "timeout", "unresponsive"):
        rollout = await claim(store)
        outcomes[status] = (await store.update_attempt(rollout.rollout_id, "latest", status=status)).outcome
    assert outcomes == {
        "succeeded": "ok", "failed": "agent_error", "timeout": "timeout", "unresponsive": "unresponsive",
    }  # fmt: skip


async def test_story_tells_what_happened(store: AnyStore) -> None:
    """The story of a rollout names its changes in order and where it stands now."""
    rollout = await claim(store)
    await store.update_attempt(rollout.rollout_id, "latest", status="failed")
    story = await store.story(rollout.rollout_id)
    kinds = [line.split()[2] for line in story if line.startswith("#")]
    assert kinds == ["enqueued", "claimed", "failed"]
    assert any(line.startswith("now: failed") for line in story)
    assert await store.story("nope") == ["now: rollout nope does not exist"]


@pytest.mark.parametrize("length", [100, 100_000, 5_000_000])
async def test_an_error_of_any_length_is_kept_in_part(store: AnyStore, length: int) -> None:
    """A runner whose agent fails with ten megabytes of text reports all the same; both ends of it stay."""
    rollout = await claim(store)
    error = "Traceback\n" + "x" * length + "\nValueError: in the end"
    attempt = await store.finish_attempt(rollout.rollout_id, rollout.attempt.attempt_id, [], "failed", error=error)
    assert attempt.error is not None
    assert attempt.error.startswith("Traceback") and attempt.error.endswith("ValueError: in the end")
    assert len(attempt.error) == len(error) if length == 100 else 60_000 < len(attempt.error) <= 65_536
    assert present(await store.get_latest_attempt(rollout.rollout_id)).error == attempt.error
    before = (await store.statistics())["accounted_bytes"]
    assert before > len(attempt.error)
