"""What the core counts: sketches, buckets of ten seconds, rewards by version; through snapshots too."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raystore.core import meters, snapshot
from raystore.core.meters import BUCKET_SECONDS, BUCKETS, REASONS, VERSIONS, Meters, Sketch
from raystore.core.state import State
from raystore.errors import AttemptNotFoundError
from tests.core.conftest import Core
from tests.core.test_retries import rule, ruled

numbers = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=200)


def sketch_of(values: list[float]) -> Sketch:
    sketch = Sketch()
    for value in values:
        sketch.add(value)
    return sketch


@given(numbers, st.floats(0.01, 1.0))
def test_a_quantile_is_within_five_percent(values: list[float], share: float) -> None:
    """Of the value that this share of all is not above."""
    exact = sorted(values)[max(math.ceil(share * len(values) - 1e-9), 1) - 1]
    (found,) = sketch_of(values).quantiles(share)
    assert found is not None and abs(found - exact) <= 0.05 * exact
    assert sketch_of(values).quantiles(share, 1.0)[0] == found


@given(numbers, numbers)
def test_sketches_add_up(some: list[float], others: list[float]) -> None:
    """Two of them are as that of all the numbers."""
    merged, whole = sketch_of(some), sketch_of(some + others)
    merged.merge(sketch_of(others))
    assert merged.counts == whole.counts and merged.summary()["max"] == whole.summary()["max"]
    assert merged.total == pytest.approx(whole.total)


def test_numbers_that_are_not_above_zero_count() -> None:
    """A clock that stood still, or was set back, gives such durations."""
    sketch = sketch_of([0.0, -1.0, 0.0, 8.0])
    assert sketch.count == 4 and sketch.quantiles(0.5) == [0.0]
    assert sketch.quantiles(1.0) == [pytest.approx(8.0, rel=0.05)]
    assert Sketch().quantiles(0.5, 0.9) == [None, None]


def total(core: Core, seconds: float = 3600.0) -> dict[str, Any]:
    return meters.totals(core.state.meters.since(core.now - seconds))


def spans_of(count: int, reward: float | None = None) -> list[list[Any]]:
    return [[-1, f"s{n}", "t", None, "a", 1.0, 2.0, reward, b"body", -1] for n in range(count)]


def test_what_happens_is_counted(core: Core) -> None:
    """Rollouts, attempts, outcomes, spans, durations and waits; an attempt that is tried again is no end."""
    session = core.open("one")
    for mode in ("train", "train", "val"):
        core.enqueue(mode=mode, config=ruled(rule("agent_error", 2)))
    core.tick(2.0)
    first, second, third = core.hold(session, 3)
    core.tick(4.0)
    for spans in (spans_of(3, 0.5), spans_of(4, 0.5)):  # the first three come again
        core.run("add_spans", session=session, rollout_id=first[0], attempt_id=first[1], spans=spans)
    core.finish(first, "succeeded", "ok", session)
    core.finish(second, "failed", "agent_error", session)
    core.run("cancel_rollouts", rollout_ids=[third[0]], group_id=None, tags=None)
    found = total(core)
    assert (found["enqueued"], found["started"], found["spans"]) == (3, 3, 4)
    assert found["span_bytes"] == core.state.spans.bytes
    assert found["finished"] == {"ok": 1, "cancelled": 1}
    assert found["retried"] == {"agent_error": 1}
    assert found["waits"]["count"] == 3 and found["waits"]["max"] == pytest.approx(2.0)
    assert found["durations"]["max"] == pytest.approx(4.0)
    (moments,) = core.state.meters.versions.values()
    assert moments.summary() == {"count": 1, "mean": 0.5, "std": 0.0, "min": 0.5, "max": 0.5}


def test_calls_of_models_are_counted_once_the_attempt_ends(core: Core) -> None:
    """Refused with the ending, they are not."""
    session = core.open("one")
    core.enqueue()
    (key,) = core.hold(session)
    calls = {"turns": 2, "prompt_tokens": 30, "response_tokens": 7, "finish_reasons": {"stop": 1, "length": 1}}
    changes = {"status": "succeeded", "outcome": "ok", "calls": calls}
    with pytest.raises(AttemptNotFoundError):
        core.run("finish", session=session, rollout_id=key[0], attempt_id="at-none", spans=[], changes=changes)
    assert total(core)["turns"] == 0
    core.run("finish", session=session, rollout_id=key[0], attempt_id=key[1], spans=[], changes=changes)
    assert {name: total(core)[name] for name in calls} == calls


def test_rewards_are_kept_by_version_and_mode(core: Core) -> None:
    """By the version of the policy with which the last attempt ran; NaN is no reward."""
    session = core.open("one")
    for version in (3, 4):
        core.run("put_resources", resources_id="policy", resources=b"x", policy_version=version, holds_objects=False)
        for mode, reward in (("train", 1.0), ("val", 0.0), ("train", math.nan)):
            rollout_id = core.enqueue(mode=mode, resources_id="policy")
            (key,) = core.hold(session)
            core.run("add_spans", session=session, rollout_id=rollout_id, attempt_id=key[1], spans=spans_of(1, reward))
            core.finish(key, "succeeded", "ok", session)
    versions = core.state.meters.versions
    found = {key: moments.summary()["mean"] for key, moments in versions.items() if key[0] == "policy"}
    assert found == {
        ("policy", 3, "train"): 1.0, ("policy", 3, "val"): 0.0, ("policy", 4, "train"): 1.0, ("policy", 4, "val"): 0.0
    }  # fmt: skip


def test_an_hour_is_kept(core: Core) -> None:
    """Only buckets in which something happened; the oldest go."""
    for number in range(BUCKETS + 40):
        if number % 2 == 0:
            core.enqueue()
        core.tick(BUCKET_SECONDS)
    assert len(core.state.meters.since(0)) == (BUCKETS + 40) // 2
    for _ in range(BUCKETS):
        core.enqueue()
        core.tick(BUCKET_SECONDS)
    assert len(core.state.meters.since(0)) == BUCKETS
    assert total(core, 100.0)["enqueued"] == 10


def test_what_is_kept_is_bounded() -> None:
    """However many versions and finish reasons there are."""
    found = Meters()
    for version in range(2 * VERSIONS):
        found.finished(1.0, "succeeded", "ok", None, ("policy", version), None, 1.0)
    assert len(found.versions) == VERSIONS and ("policy", 2 * VERSIONS - 1, "") in found.versions
    calls: Any = {"turns": 1, "prompt_tokens": 0, "response_tokens": 0}
    for number in range(5 * REASONS):
        found.called(1.0, calls | {"finish_reasons": {f"r{number}": 2}})
    assert len(found.now.finish_reasons) == REASONS + 1
    assert sum(found.now.finish_reasons.values()) == 10 * REASONS


def test_a_snapshot_has_all_of_it(core: Core) -> None:
    """And goes on counting where it was."""
    test_what_happens_is_counted(core)
    test_rewards_are_kept_by_version_and_mode(core)
    again = State(core.state.settings)
    snapshot.restore(again, list(snapshot.sections(core.state, {})), lambda packed: packed)
    assert again.meters.image() == core.state.meters.image()
    assert again.meters.at(core.now).number == core.state.meters.now.number
    assert len(again.meters.since(0)) == len(core.state.meters.since(0))
