"""Steps: what `feed.on_step` tells trackers after each ack, under names that they know."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import raystore as rs
from raystore.client import steps
from tests.conftest import MakeMemoryStore
from tests.feed.conftest import RIGHT, Failed, running
from tests.helpers import AnyStore

DOCS = Path(__file__).parent.parent.parent / "docs" / "metrics.md"


class Tracker:
    """Has the call shape of wandb, mlflow (`log_metrics`) and trackio: `log(metrics, step=None)`."""

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, metrics))


async def train(feed: rs.Feed, *, first: int = 0, keep: Any = None, **metrics: Any) -> int:
    """Train on all batches; the step of the last."""
    step = first
    await feed.publish("weights", version=step)
    async for batch in feed.batches(keep=keep):
        step += 1
        await feed.publish("weights", version=step)
        await batch.ack(step=step, metrics=metrics)
        await batch.ack(step=step, metrics=metrics)  # which may be repeated
    return step


async def test_each_step_is_told_once(store: AnyStore) -> None:
    """With its own number, and plain floats only."""
    tracker = Tracker()
    feed = store.feed("train", list(range(6)), **RIGHT)
    feed.on_step(tracker.log)
    feed.on_step(lambda metrics, step: metrics.clear())  # everybody has a mapping of his own
    async with running(store, lambda rollout: float(rollout.input)):
        assert await train(feed, first=40, loss=0.5, nested={"kl": 1, "name": "x"}, flag=True) == 43
    assert [step for step, _ in tracker.rows] == [41, 42, 43]
    for step, found in tracker.rows:
        assert all(type(value) is float for value in found.values())
        assert found["training/global_step"] == step and found["training/epoch"] == 0
        assert (
            found["loss"] == 0.5 and found["nested/kl"] == 1.0 and found["flag"] == 1.0 and "nested/name" not in found
        )
        assert found["groups/trained"] == 2 and found["rollouts/trained"] == 4
        assert found["perf/total_num_tokens"] == 20 and found["perf/throughput"] > found["perf/rollouts_per_second"] > 0
        assert 0 < found["timing_s/wait"] <= found["timing_s/step"]
        assert found["critic/rewards/min"] <= found["critic/rewards/mean"] <= found["critic/rewards/max"]
        assert 0 <= found["lag/mean"] <= found["lag/max"] <= 1
        assert found["critic/rewards/mean_unfiltered"] == found["critic/rewards/mean"]
    assert sum(found["critic/rewards/mean"] for _, found in tracker.rows) == pytest.approx(7.5)


async def test_shares_of_what_was_not_trained_on(store: AnyStore) -> None:
    """Filtered and failed groups since the last step, and the reward of all that were judged."""
    tracker = Tracker()
    feed = store.feed("train", list(range(8)), **RIGHT | {"batch": 4}, max_lag=0, order="in_order")
    feed.on_step(tracker.log)

    def agent(rollout: Any) -> float:
        if rollout.input in (1, 2):
            raise Failed
        return 0.0 if rollout.input < 4 else float(rollout.input)

    async with running(store, agent):
        await train(feed, keep=lambda group: group.input > 3)
    (found,) = [found for _, found in tracker.rows]
    assert found["groups/trained"] == 4
    assert found["groups/filtered_fraction"] == 0.25 and found["groups/failed_fraction"] == 0.25
    assert found["groups/stale_fraction"] == 0.0
    assert found["critic/rewards/mean_unfiltered"] == pytest.approx(found["critic/rewards/mean"] * 4 / 6)


async def test_environments_are_told_apart(store: AnyStore) -> None:
    """Where there are several."""
    tracker = Tracker()
    feed = store.feed("train", {"math": [1, 2], "code": [3, 4]}, **RIGHT | {"batch": 4})
    feed.on_step(tracker.log)
    async with running(store, lambda rollout: float(rollout.input)):
        await train(feed)
    ((_, found),) = tracker.rows
    assert found["env/math/rewards/mean"] == 1.5 and found["env/code/rewards/mean"] == 3.5


async def test_a_tracker_that_fails_stops_nothing(store: AnyStore, caplog: pytest.LogCaptureFixture) -> None:
    """It is told once; the others go on, and what is asynchronous is awaited."""
    found: list[int] = []

    def broken(metrics: dict[str, float], step: int) -> None:
        raise ConnectionError("no network")

    async def slow(metrics: dict[str, float], step: int) -> None:
        found.append(step)

    feed = store.feed("train", list(range(4)), **RIGHT)
    assert feed.on_step(broken) is broken
    feed.on_step(slow)
    async with running(store, lambda rollout: 1.0):
        await train(feed)
    assert found == [1, 2]
    (told,) = [record for record in caplog.records if "on_step" in record.getMessage()]
    assert told.levelno == logging.ERROR and "no network" in told.getMessage() and "step 1" in told.getMessage()


async def test_after_a_resume_the_steps_are_those_of_the_trainer(make_memory_store: MakeMemoryStore) -> None:
    """Which goes on with the number of its model, and is told of its own batches only."""
    store, tracker = make_memory_store(), Tracker()
    async with running(store, lambda rollout: 1.0):
        feed = store.feed("train", list(range(8)), **RIGHT)
        feed.on_step(tracker.log)
        await feed.publish("weights", version=0)
        async for batch in feed.batches():
            await batch.ack(step=1)
            break
        await feed.close()
        again = store.feed("train", list(range(8)), **RIGHT)
        again.on_step(tracker.log)
        await again.restore(step=1)
        assert await train(again, first=1) == 4
    assert [step for step, _ in tracker.rows] == [1, 2, 3, 4]
    assert all(found["groups/failed_fraction"] == 0 for _, found in tracker.rows)


async def test_what_is_not_callable_is_refused(make_memory_store: MakeMemoryStore) -> None:
    """At once."""
    feed = make_memory_store().feed("train", [1], **RIGHT)
    with pytest.raises(rs.InvalidValueError, match="function='wandb'.*a function of"):
        feed.on_step("wandb")  # type: ignore[arg-type]


async def test_trackio_takes_the_line_of_the_docs(
    make_memory_store: MakeMemoryStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It writes the steps into its database, which is read back."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio: Any = importlib.import_module("trackio")
    trackio.init(project="raystore-test", embed=False)
    line = re.search(r"^feed\.on_step\((lambda.*trackio\.log.*)\)$", DOCS.read_text(), re.MULTILINE)
    assert line is not None
    log: Callable[[dict[str, float], int], Any] = eval(line[1], {"trackio": trackio})
    store = make_memory_store()
    feed = store.feed("train", list(range(4)), **RIGHT)
    feed.on_step(log)
    async with running(store, lambda rollout: 1.0):
        await train(feed)
    trackio.finish()
    storage: Any = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    run = storage.get_runs("raystore-test")[0]
    rows = [(row["step"], row["critic/rewards/mean"]) for row in storage.get_logs("raystore-test", run)]
    assert rows == [(1, 1.0), (2, 1.0)]


async def test_every_name_is_in_the_docs(make_memory_store: MakeMemoryStore) -> None:
    """And every name of the docs is told."""
    tracker = Tracker()
    store = make_memory_store()
    feed = store.feed("train", {"math": [1], "code": [2]}, **RIGHT)
    feed.on_step(tracker.log)
    async with running(store, lambda rollout: 1.0):
        await feed.publish("weights", version=0)
        for name, items in (("one", [1, 2]), ("two", {"math": [1], "code": [2]})):
            await (await feed.evaluate(items, version=0, name=name, samples=2)).result()
        await train(feed)
    ((_, found),) = tracker.rows
    listed = set(re.findall(r"^\| `([^`]+)` \|", DOCS.read_text().partition("## Per step")[2], re.MULTILINE))
    told = {re.sub(r"^env/\w+/", "env/<name>/", name) for name in found}
    told = {re.sub(r"^eval/\w+/", "eval/<name>/", name).replace("/math/", "/<environment>/") for name in told}
    told = {re.sub(r"pass@\d+$", "pass@<k>", name) for name in told}
    assert {name for name in told if "/code/" not in name} - {"eval/<name>/<environment>/pass@<k>"} == listed
    assert set(steps.TOLD) <= {name.removeprefix("groups/").removesuffix("_fraction") for name in listed}


# -- evaluations -------------------------------------------------------------------------------------------------------


async def test_an_evaluation_is_told_once(store: AnyStore) -> None:
    """With the step after its end: its version, mean, interval, pass@k, and its environments if it has several."""
    tracker = Tracker()
    feed = store.feed("train", list(range(8)), **RIGHT)
    feed.on_step(tracker.log)

    def agent(rollout: Any) -> float:
        return 1.0 if rollout.mode == "train" else float(rollout.input)

    async with running(store, agent):
        await feed.publish("weights", version=0)
        before = await feed.evaluate([0, 1], version=0, name="before")
        await before.result()
        step = 0
        async for batch in feed.batches():
            step += 1
            await feed.publish("weights", version=step)
            if step == 2:
                both = await feed.evaluate({"a": [0, 1], "b": [1, 1]}, version=2, samples=2)
                await both.result()
            await batch.ack(step=step)
    told = [{name: value for name, value in found.items() if name.startswith("eval/")} for _, found in tracker.rows]
    assert told[0]["eval/before/reward_mean"] == 0.5 and told[0]["eval/before/version"] == 0
    assert told[2] == told[3] == {}
    assert told[1] == {
        "eval/eval/version": 2.0, "eval/eval/reward_mean": 0.75, "eval/eval/failed_fraction": 0.0,
        "eval/eval/reward_low": pytest.approx(-0.0455, abs=1e-3),
        "eval/eval/reward_high": pytest.approx(1.5456, abs=1e-3),
        "eval/eval/pass@1": 0.75, "eval/eval/pass@2": 0.75,
        "eval/eval/a/reward_mean": 0.5, "eval/eval/a/pass@1": 0.5, "eval/eval/a/pass@2": 0.5,
        "eval/eval/a/reward_low": pytest.approx(-5.853, abs=1e-2),
        "eval/eval/a/reward_high": pytest.approx(6.853, abs=1e-2),
        "eval/eval/b/reward_mean": 1.0, "eval/eval/b/pass@1": 1.0, "eval/eval/b/pass@2": 1.0,
        "eval/eval/b/reward_low": 1.0, "eval/eval/b/reward_high": 1.0,
    }  # fmt: skip


async def test_what_was_evaluated_before_is_not_told_again(make_memory_store: MakeMemoryStore) -> None:
    """To another process, unless it asks for it; one that was dropped is never told."""
    store = make_memory_store()
    feed = store.feed("train", list(range(8)), **RIGHT)
    async with running(store, lambda rollout: 1.0):
        await feed.publish("weights", version=0)
        for name in ("old", "asked"):
            await (await feed.evaluate([1], version=0, name=name)).result()
        await feed.close()
        tracker = Tracker()
        feed = store.feed("train", list(range(8)), **RIGHT)
        feed.on_step(tracker.log)
        await feed.restore(0)
        await feed.publish("weights", version=0)
        await feed.evaluate([1], version=0, name="asked")
        await store.pause(["none"])
        step = 0
        async for batch in feed.batches():
            step += 1
            await feed.publish("weights", version=step)
            await (await feed.evaluate([1], version=step, name="dropped", queue="none")).drop()
            await batch.ack(step=step)
    names = [name.split("/")[1] for _, found in tracker.rows for name in found if name.endswith("reward_mean")]
    assert names == ["asked"]
