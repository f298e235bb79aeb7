"""States that attempts save: what the next attempt has of them, which spans count as its own, and who may save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import raystore as rs
from tests.helpers import AnyStore, claim, make_span, present


def ids_of(rollout: rs.AttemptedRollout) -> tuple[str, str]:
    return rollout.rollout_id, rollout.attempt.attempt_id


def span_named(rollout: rs.AttemptedRollout, name: str, **more: Any) -> rs.Span:
    return make_span(rollout, 0, name=name, **more)


async def again(store: AnyStore, rollout: rs.AttemptedRollout) -> rs.AttemptedRollout:
    """The next attempt of a rollout, whose runner gave it back."""
    await store.finish_attempt(*ids_of(rollout), [], "unresponsive", outcome="withdrawn")
    following = present(await store.dequeue_rollout())
    assert following.rollout_id == rollout.rollout_id
    return following


async def names(store: AnyStore, rollout: rs.AttemptedRollout, attempt_id: str | None = "latest") -> list[str]:
    return [span.name for span in await store.query_spans(rollout.rollout_id, attempt_id)]


async def test_the_next_attempt_goes_on_from_what_was_saved(store: AnyStore) -> None:
    """It has the newest state, and the spans until then as its own; not those of work that was not saved."""
    first = await claim(store)
    assert await store.get_saved_state(*ids_of(first)) is None
    await store.save_state(*ids_of(first), {"turns": [1]}, [span_named(first, "one")])
    await store.save_state(*ids_of(first), {"turns": [1, 2]}, [span_named(first, "two")])
    await store.add_unnumbered_spans([span_named(first, "not saved")])
    second = await again(store, first)
    assert (first.attempt.resumed_from, second.attempt.resumed_from) == (None, first.attempt.attempt_id)
    assert await store.get_saved_state(*ids_of(second)) == {"turns": [1, 2]}
    assert await names(store, second) == ["one", "two"]
    await store.save_state(*ids_of(second), (3, {4}), [span_named(second, "three")])
    third = await again(store, second)
    assert third.attempt.resumed_from == second.attempt.attempt_id
    assert await store.get_saved_state(*ids_of(third)) == (3, {4})
    await store.finish_attempt(*ids_of(third), [span_named(third, "four")], "succeeded")
    assert await names(store, third) == ["one", "two", "three", "four"]
    assert await names(store, third, first.attempt.attempt_id) == ["one", "two", "not saved"]
    assert await names(store, third, second.attempt.attempt_id) == ["one", "two", "three"]
    assert await names(store, third, None) == ["one", "two", "not saved", "three", "four"]
    spans = (await store.query_many_spans([third.rollout_id]))[third.rollout_id]
    assert [span.name for span in spans] == ["one", "two", "three", "four"]
    assert {span.attempt_id for span in spans} == {third.attempt.attempt_id}
    numbers = [span.sequence_id for span in spans]
    assert numbers == sorted(numbers)
    (page,) = await store.query_spans(third.rollout_id, "latest", name="two")
    assert page.attempt_id == third.attempt.attempt_id


async def test_an_attempt_that_did_not_save_is_passed_over(store: AnyStore) -> None:
    """The one after it goes on from the same state; its own spans are in nobody's prefix."""
    first = await claim(store)
    await store.save_state(*ids_of(first), 1, [span_named(first, "one")])
    second = await again(store, first)
    await store.add_unnumbered_spans([span_named(second, "lost")])
    third = await again(store, second)
    assert third.attempt.resumed_from == first.attempt.attempt_id
    assert await names(store, third) == ["one"]
    assert await names(store, third, second.attempt.attempt_id) == ["one", "lost"]


async def test_none_lets_the_next_attempt_begin_anew(store: AnyStore) -> None:
    """And what the attempt that says so has taken over counts no longer as its own, the reward included."""
    first = await claim(store)
    await store.save_state(*ids_of(first), 1, [rewarded(first, 0.25)])
    second = await again(store, first)
    assert second.attempt.reward == 0.25
    await store.save_state(*ids_of(second), None, [span_named(second, "own")])
    now = present(await store.get_latest_attempt(first.rollout_id))
    assert (now.resumed_from, now.reward) == (None, None)
    assert await names(store, second) == ["own"]
    assert await store.get_saved_state(*ids_of(second)) is None
    third = await again(store, second)
    assert third.attempt.resumed_from is None and await names(store, third) == []
    await store.save_state(*ids_of(third), None)  # there is nothing to forget


def rewarded(rollout: rs.AttemptedRollout, reward: float) -> rs.Span:
    attributes = {"agentlightning.reward.0.name": "reward", "agentlightning.reward.0.value": reward}
    return make_span(rollout, 0, name="agentlightning.annotation", attributes=attributes)


async def test_the_reward_of_what_was_saved_is_taken_over(store: AnyStore) -> None:
    """Of the attempt and, once it has succeeded, of the rollout; not a reward that came after the state."""
    first = await claim(store)
    await store.save_state(*ids_of(first), 1, [rewarded(first, 0.5)])
    await store.add_unnumbered_spans([rewarded(first, 0.75)])
    second = await again(store, first)
    assert second.attempt.reward == 0.5
    done = await store.finish_attempt(*ids_of(second), [], "succeeded")
    found = present(await store.get_rollout_by_id(first.rollout_id))
    assert (done.reward, found.reward) == (0.5, 0.5)
    assert rs.find_final_reward(await store.query_spans(first.rollout_id, "latest")) == 0.5


@pytest.mark.parametrize("end", ["timeout", "cancelled", "superseded", "failed", "succeeded"])
async def test_an_attempt_that_is_over_saves_nothing(store: AnyStore, end: str) -> None:
    """Its state is refused with what became of it; the spans that came with it are stored, as late ones are, once."""
    first = await claim(store, timeout_seconds=5.0 if end == "timeout" else None)
    await store.save_state(*ids_of(first), "kept", [span_named(first, "one")])
    outcome = end
    if end == "timeout":
        await store.testing.tick(6)
    elif end == "cancelled":
        await store.cancel_rollouts([first.rollout_id])
    elif end == "superseded":
        await store.start_attempt(first.rollout_id)
    else:
        ended = await store.update_attempt(*ids_of(first), status="failed" if end == "failed" else "succeeded")
        outcome = str(ended.outcome)
    with pytest.raises(rs.AttemptOverError) as caught:
        await store.save_state(*ids_of(first), "late", [span_named(first, "late")])
    assert caught.value.args == (*ids_of(first), outcome) and isinstance(caught.value, ValueError)
    with pytest.raises(rs.AttemptOverError, match="Drop this work"):
        await store.get_saved_state(*ids_of(first))
    with pytest.raises(rs.AttemptOverError):
        await store.save_state(*ids_of(first), b"x" * 200_000, [span_named(first, "behind a large one")])
    assert await names(store, first, first.attempt.attempt_id) == ["one", "late", "behind a large one"]
    if end == "superseded":
        assert await names(store, first) == ["one"]
        latest = present(await store.get_latest_attempt(first.rollout_id))
        assert await store.get_saved_state(first.rollout_id, latest.attempt_id) == "kept"


async def test_ids_that_do_not_exist(store: AnyStore) -> None:
    """Are refused as for spans; "latest" too, since the newest attempt may be another's by now."""
    first = await claim(store)
    for save in (store.save_state, store.get_saved_state):
        more: tuple[Any, ...] = (1,) if save == store.save_state else ()
        with pytest.raises(rs.RolloutNotFoundError):
            await save("ro-none", "at-none", *more)
        with pytest.raises(rs.AttemptNotFoundError):
            await save(first.rollout_id, "at-none", *more)
        with pytest.raises(rs.AttemptNotFoundError):
            await save(first.rollout_id, "latest", *more)
        with pytest.raises(rs.InvalidValueError):
            await save(first.rollout_id, "", *more)
    with pytest.raises(rs.InvalidValueError, match="encoded"):
        await store.get_saved_state(*ids_of(first), encoded="yes")  # type: ignore[arg-type]


async def test_a_state_that_cannot_be_kept_leaves_the_one_before(make_store: Callable[..., AnyStore]) -> None:
    """Too large, or impossible to pickle: an error that says so, and nothing has changed."""
    store = make_store(limits={"state_bytes": 1_000})
    first = await claim(store)
    await store.save_state(*ids_of(first), "kept")
    with pytest.raises(rs.PayloadTooLargeError, match=r"state is \d+ bytes and the limit is 1000"):
        await store.save_state(*ids_of(first), "x" * 2_000, [span_named(first, "with it")])
    with pytest.raises(rs.PayloadNotPicklableError, match="state"):
        await store.save_state(*ids_of(first), (number for number in range(3)))
    assert await store.get_saved_state(*ids_of(first)) == "kept"
    assert await names(store, first) == []


@pytest.mark.parametrize("size", [10, 200_000, 3_000_000])
async def test_a_state_of_any_size_with_its_spans(store: AnyStore, size: int) -> None:
    """A large one travels behind its spans, and they agree as those of a small one do."""
    first = await claim(store)
    await store.save_state(*ids_of(first), b"x" * size, [span_named(first, f"s{number}") for number in range(5)])
    second = await again(store, first)
    assert await store.get_saved_state(*ids_of(second)) == b"x" * size
    assert await names(store, second) == [f"s{number}" for number in range(5)]


async def test_how_long_a_state_is_kept(make_store: Callable[..., AnyStore]) -> None:
    """While its rollout waits, runs or has failed; not once it has succeeded, was cancelled, released or deleted."""
    store = make_store()
    states, usual = b"x" * 100_000, (await store.statistics())["payload_bytes"]

    async def bytes_now() -> int:
        return (await store.statistics())["payload_bytes"] - usual

    failed = await claim(store)
    await store.save_state(*ids_of(failed), states)
    await store.update_attempt(*ids_of(failed), status="failed")
    assert await bytes_now() > len(states)
    await store.requeue([failed.rollout_id])
    following = present(await store.dequeue_rollout())
    assert following.attempt.resumed_from == failed.attempt.attempt_id
    assert await store.get_saved_state(*ids_of(following)) == states
    await store.update_attempt(*ids_of(following), status="failed")
    assert await store.release([failed.rollout_id]) == 1
    assert await bytes_now() < len(states)
    await store.requeue([failed.rollout_id])
    assert present(await store.dequeue_rollout()).attempt.resumed_from is None
    for end in ("succeeded", "cancelled", "deleted"):
        made = await claim(store)
        await store.save_state(*ids_of(made), states)
        await store.save_state(*ids_of(made), states)  # in place of the first
        assert len(states) < await bytes_now() < 2 * len(states)
        if end == "succeeded":
            await store.update_attempt(*ids_of(made), status="succeeded")
        elif end == "cancelled":
            await store.cancel_rollouts([made.rollout_id])
        else:
            await store.delete_rollouts([made.rollout_id])
        assert await bytes_now() < len(states)


async def test_a_save_is_a_sign_of_life(store: AnyStore) -> None:
    """As a span is: an attempt that saves does not fall silent, and one that only looked dead goes on."""
    first = await claim(store, unresponsive_seconds=5.0, max_attempts=2, retry_condition=["unresponsive"])
    for _ in range(3):
        await store.testing.tick(4)
        await store.save_state(*ids_of(first), 1)
    await store.testing.tick(6)
    assert present(await store.get_rollout_by_id(first.rollout_id)).status == "requeuing"
    await store.save_state(*ids_of(first), 2)
    found = present(await store.get_rollout_by_id(first.rollout_id))
    assert (found.status, found.attempt.status) == ("running", "running")


async def test_a_claim_that_is_given_back_leaves_the_state(store: AnyStore) -> None:
    """Whoever claims next goes on from it; so does a rollout that is started by hand."""
    first = await claim(store)
    await store.save_state(*ids_of(first), 1, [span_named(first, "one")])
    await store.finish_attempt(*ids_of(first), [], "unresponsive", outcome="withdrawn")
    started = await store.start_attempt(first.rollout_id)
    assert started.attempt.resumed_from == first.attempt.attempt_id
    assert await names(store, started) == ["one"]


async def test_what_is_told_of_it(store: AnyStore) -> None:
    """The story says who saved, who went on from it, and who began anew."""
    first = await claim(store)
    await store.save_state(*ids_of(first), "state")
    second = await again(store, first)
    story = "\n".join(await store.story(first.rollout_id))
    assert f"goes_on attempt {second.attempt.attempt_id} resumed_from={first.attempt.attempt_id}" in story
    assert f"a state of 7 bytes is saved by attempt {first.attempt.attempt_id}" in story
    assert f"went on from what {first.attempt.attempt_id} saved" in story
    await store.save_state(*ids_of(second), None)
    assert f"begins_anew attempt {second.attempt.attempt_id}" in "\n".join(await store.story(first.rollout_id))
