"""Evaluation beside training, on every store: what is measured, what it changes of training, and mistakes of users."""

from __future__ import annotations

import asyncio
import itertools
import pickle
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

import raystore as rs
from raystore.wire import evaluations as wire
from tests.conftest import MakeMemoryStore
from tests.feed.conftest import RIGHT, Failed, running, trained
from tests.helpers import AnyStore, present, until

pytestmark = pytest.mark.timeout(60)

UNTYPED: Any = rs  # to be called wrongly


def of(rollout: Any) -> str:
    """What a rollout is of: training, or an evaluation."""
    return "training" if rollout.mode == "train" else str(rollout.tags["eval"])


# -- results -----------------------------------------------------------------------------------------------------------


async def test_items_are_sampled_and_scored_by_environment(store: AnyStore) -> None:
    """Each item so often, with its tags; what failed stays in the denominator."""
    counts: Counter[Any] = Counter()

    def agent(rollout: Any) -> float:
        counts[rollout.tags["env"], rollout.input] += 1
        assert rollout.mode == "val" and rollout.tags == {"eval": "bench", "env": rollout.tags["env"], "k": 1}
        if rollout.tags["env"] == "code" and counts[rollout.tags["env"], rollout.input] > 1:
            raise Failed
        return float(rollout.input % 2)

    evaluation = await store.evaluate("bench", {"math": [1, 2], "code": [3, 5]}, samples=4, tags={"k": 1})
    assert evaluation.name == "bench" and evaluation.version is None
    async with running(store, agent):
        found = await evaluation.result(timeout=30)
    assert found.status == "finished" and found.versions is None and not found.pinned and found.end_time is not None
    assert set(counts.values()) == {4} and len(counts) == 4
    assert found.environments["math"].mean == 0.5 and found.environments["math"].pass_at == {1: 0.5, 2: 0.5, 4: 0.5}
    code = found.environments["code"]
    assert (code.samples, code.passed, code.failed, code.mean) == (8, 2, 6, 0.25)
    assert code.pass_at == {1: pytest.approx(0.25), 2: pytest.approx(0.5), 4: 1.0} and code.confidence == (0.25, 0.25)
    assert found.overall.samples == 16 and found.overall.mean == pytest.approx(0.375)
    low, high = present(found.overall.confidence)
    assert low < 0.375 < high
    assert rs.EvaluationResult.model_validate_json(found.model_dump_json()) == found


async def test_it_returns_once_all_is_enqueued(store: AnyStore) -> None:
    """And waits for nothing; its state so far is told."""
    evaluation = await store.evaluate("bench", range(700), samples=2)
    found = await evaluation.status()
    assert (found.status, found.items, found.enqueued, found.overall.samples) == ("running", 700, 700, 0)
    assert found.overall.mean is None and found.overall.pass_at == {}
    assert (await store.statistics())["queue_length"] == 1400
    group = present(await store.get_group("bench@-/699"))
    assert group.input == 699 and len(group.members) == 2
    with pytest.raises(TimeoutError, match="0 of 1400 samples"):
        await evaluation.result(timeout=0.05)
    assert await evaluation.drop() and not await evaluation.drop()
    assert (await evaluation.result()).status == "dropped" and not (await store.statistics())["queue_length"]


async def test_the_result_is_waited_for_in_the_store(store: AnyStore) -> None:
    """By several at once; one who is cancelled leaves the others alone; a drop answers them, too."""
    evaluation = await store.evaluate("bench", [1, 2])
    waiting = [asyncio.ensure_future(evaluation.result()) for _ in range(3)]
    await until(lambda: _waits(store, 3))
    waiting.pop().cancel()
    await store.drop_evaluation("bench")
    found = await asyncio.gather(*waiting)
    assert [one.status for one in found] == ["dropped"] * 2


async def _waits(store: AnyStore, count: int) -> bool:
    return (await store.statistics())["waiters"] >= count


def test_blocking_calls(store: AnyStore) -> None:
    """The same without an event loop."""
    evaluation = store.sync.evaluate("bench", ["x"], samples=2)
    for _ in range(2):
        rollout = present(store.sync.dequeue_rollout())
        store.sync.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, "succeeded")
    found = evaluation.sync.result(timeout=10)
    assert found == evaluation.sync.status() == store.sync.evaluations("bench")[0] and not evaluation.sync.drop()
    assert found.overall.failed == 2  # they have no reward
    with pytest.raises(rs.EvaluationNotFoundError):
        store.sync.drop_evaluation("none")


async def test_progress_may_be_shown(store: AnyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for rollouts; where nothing is drawn it changes nothing."""
    evaluation = await store.evaluate("bench", [1])
    async with running(store, lambda rollout: 1.0):
        assert (await evaluation.result(progress=True)).overall.mean == 1.0


# -- beside training ---------------------------------------------------------------------------------------------------


async def test_an_evaluation_beside_training(store: AnyStore) -> None:
    """It is pinned while training goes on, and its items are in no batch; the curve has a point for each step."""
    feed = store.feed("train", list(range(12)), **RIGHT, eval_share=0.5)
    seen: dict[str, set[int]] = {}

    def agent(rollout: Any) -> float:
        seen.setdefault(of(rollout), set()).add(rollout.attempt.policy_version)
        return float(rollout.attempt.policy_version)

    evaluations = []

    async def after(batch: Any) -> None:
        step = batch.number
        await feed.publish([float(step)], version=step)
        if step % 2 == 0:
            evaluations.append(await feed.evaluate([1, 2, 3], version=step, samples=2, name=f"e{step}"))
            evaluations.append(await feed.evaluate([1, 2, 3], version=step, samples=2))

    async with running(store, agent):
        batches = await trained(feed, after=after)
        results = [await evaluation.result(timeout=30) for evaluation in evaluations]
    assert all(rollout.mode == "train" for groups in batches for group in groups for rollout in group.rollouts)
    assert sum(len(groups) for groups in batches) == 12
    for one in results:
        assert one.pinned and one.versions == (one.version, one.version) and one.overall.mean == one.version
    assert all(seen[f"e{step}"] == {step} for step in (2, 4, 6))
    curve = await store.evaluations("eval")
    assert [one.version for one in curve] == [2, 4, 6] and [one.overall.mean for one in curve] == [2.0, 4.0, 6.0]
    assert [one.name for one in await store.evaluations()] == ["e2", "e4", "e6", "eval", "eval", "eval"]
    status = await feed.status()
    assert status.streams[""].endings == {"trained": 12} and status.failed_in_a_row == 0
    await feed.close()


async def test_the_same_call_again_is_the_same(store: AnyStore) -> None:
    """After a crash of the driver, or twice in one process: nothing is sampled twice."""
    feed = store.feed("train", [1], **RIGHT)
    await feed.publish([0.0], version=0)
    first = await feed.evaluate([{"q": 1}, {"q": 2}], version=0, samples=2)
    again = await feed.evaluate([{"q": 1}, {"q": 2}], version=0, samples=2)
    assert (again.name, again.version, again.branch) == (first.name, first.version, first.branch)
    async with running(store, lambda rollout: 1.0):
        await first.result(timeout=30)
    made = (await store.statistics())["total_rollouts"]
    done = await feed.evaluate([{"q": 1}, {"q": 2}], version=0, samples=2)
    assert (await done.result()).status == "finished" and (await store.statistics())["total_rollouts"] == made
    others: Any = (([{"q": 1}], {}, "items"), ([{"q": 2}, {"q": 1}], {}, "items"),
                                   ([{"q": 1}, {"q": 2}], {"samples": 3}, "samples"))  # fmt: skip
    for items, more, differing in others:
        with pytest.raises(rs.EvaluationConflictError, match=f"{differing} differ.*another name="):
            await feed.evaluate(items, **({"version": 0, "samples": 2} | more))
    await feed.close()


async def test_a_killed_enqueue_goes_on(store: AnyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the position that it had reached, in whole parts."""
    monkeypatch.setattr(wire, "PART_ITEMS", 3)
    ask = store._transport.call
    sent: list[str] = []

    async def dies(verb: str, arguments: dict[str, Any]) -> Any:
        sent.append(verb)
        if sent.count("evaluation_add") == 3:
            raise asyncio.CancelledError
        return await ask(verb, arguments)

    monkeypatch.setattr(store._transport, "call", dies)
    with pytest.raises(asyncio.CancelledError):
        await store.evaluate("bench", range(10))
    monkeypatch.undo()
    assert [(one.enqueued, one.status) for one in await store.evaluations()] == [(6, "running")]
    evaluation = await store.evaluate("bench", range(10))
    inputs = []

    def agent(rollout: Any) -> float:
        inputs.append(rollout.input)
        return 1.0

    async with running(store, agent):
        assert (await evaluation.result(timeout=30)).overall.samples == 10
    assert sorted(inputs) == list(range(10))


async def test_two_processes_may_enqueue_the_same(store: AnyStore) -> None:
    """Each part is enqueued once, whoever comes first."""
    made = await asyncio.gather(*(store.evaluate("bench", range(600)) for _ in range(2)))
    assert (await store.statistics())["queue_length"] == 600
    assert [(await one.status()).enqueued for one in made] == [600, 600]


async def test_a_full_queue_is_waited_for(make_memory_store: MakeMemoryStore) -> None:
    """As runners make room; what would never fit is refused."""
    store = make_memory_store(max_queued=4)
    with pytest.raises(rs.OverloadedError, match="can never succeed"):
        await store.evaluate("large", [1], samples=5)
    async with running(store, lambda rollout: 1.0):
        evaluation = await store.evaluate("bench", range(20), samples=2)
        assert (await evaluation.result(timeout=30)).overall.samples == 40


async def test_a_later_one_may_drop_it(store: AnyStore) -> None:
    """By name; one of another name goes on."""
    feed = store.feed("train", [1], **RIGHT)
    await feed.publish([0.0], version=0)
    first, other = await feed.evaluate([1], version=0), await feed.evaluate([1], version=0, name="other")
    await feed.publish([1.0], version=1)
    await feed.evaluate([1], version=1, overtaken="drop")
    assert (await first.status()).status == "dropped" and (await other.status()).status == "running"
    assert [one.status for one in await store.evaluations("eval")] == ["dropped", "running"]
    await feed.close()


async def test_after_a_restore(store: AnyStore) -> None:
    """What stands is found again, and what was undone is told and dropped."""
    data = list(range(4))
    feed = store.feed("train", data, **RIGHT | {"batch": 1})
    first = await _evaluated_twice(store, feed)
    await feed.close()
    feed = store.feed("train", data, **RIGHT | {"batch": 1})
    await feed.restore(1)
    assert [(one.version, one.status, one.undone) for one in await store.evaluations("eval")] == [
        (1, "running", False), (2, "dropped", True),
    ]  # fmt: skip
    with pytest.raises(rs.VersionNotFoundError, match="undone by a restore"):
        await feed.evaluate([1], version=2)
    with pytest.raises(rs.InvalidValueError, match=r"version.*after `await feed.publish"):
        await feed.evaluate([1])
    await feed.publish([1.0], version=1)
    found = await feed.evaluate([1], version=1)
    assert (found.version, found.branch) == (first.version, first.branch)
    await feed.publish([2.5], version=2)
    anew = await feed.evaluate([1], version=2)
    assert anew.branch == 1 and "branch 1" in repr(anew)
    await feed.close()


async def _evaluated_twice(store: AnyStore, feed: rs.Feed) -> rs.Evaluation:
    """Train two steps, and begin to evaluate both when nobody runs anything any more; the evaluation of the first."""
    await feed.publish([0.0], version=0)
    async with running(store, lambda rollout: 1.0):
        async for batch in feed.batches():
            if batch.number == 2:
                break
            await feed.publish([float(batch.number)], version=batch.number)
            await batch.ack(step=batch.number)
    first = await feed.evaluate([1], version=1)
    await feed.publish([2.0], version=2)
    await batch.ack(step=2)
    await feed.evaluate([1], version=2)
    return first


async def test_another_process_may_evaluate(store: AnyStore) -> None:
    """A feed that only evaluates draws nothing and holds nothing; one that never began is unknown."""
    feed = store.feed("train", [1], **RIGHT)
    with pytest.raises(rs.FeedNotFoundError):
        await feed.evaluate([1])
    await feed.publish([0.0], version=0)
    evaluation = await feed.evaluate([1], version=0)
    async with running(store, lambda rollout: 1.0):
        assert (await evaluation.result(timeout=30)).feed == "train"
    await feed.close()
    await feed.evaluate([1], version=0)  # also once it is closed


# -- mistakes ----------------------------------------------------------------------------------------------------------


class Raises:
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        if index == 2:
            raise OSError("disk")
        return index


def forever() -> Iterator[int]:
    yield from itertools.count()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"items": []}, "items=.*at least one item"), ({"items": {}}, "items"), ({"items": None}, "items=None"),
        ({"items": iter([])}, "at least one item"), ({"items": "1+1?"}, "items='1.1.'.*dataset"),
        ({"items": 5}, "items=5"),
        ({"items": {"q": "what?"}}, r"items\['q'\]='what.'.*a list of items"),
        ({"items": {"q": {"x": 1}}}, r"items\['q'\].*lists by the names"), ({"items": {3: [1]}}, "items key=3"),
        ({"items": {"x" * 201: [1]}}, "items key=.*200 characters"),
        ({"items": {"a": [1], "b": []}}, r"items\['b'\]"), ({"items": {1, 2}}, "order"),
        ({"items": [1, None]}, r"items\[1\]=None.*a task"), ({"items": {"a": [None]}}, r"items\['a'\]\[0\]"),
        ({"items": Raises()}, "after 2 of them reading raised OSError: disk"),
        ({"items": [1, lambda: (yield)]}, None), ({"items": [1, forever()]}, r"items\[1\].*pickle"),
        ({"samples": 0}, "samples=0"), ({"samples": 1.5}, "samples=1.5"), ({"samples": 2_000_000}, "at most 1,000,000"),
        ({"samples": True}, "samples=True"), ({"items": range(1001), "samples": 1000}, "these are 1,001 items"),
        ({"name": ""}, "name"), ({"name": "a/b"}, "without '/'"), ({"name": "a@3"}, "'@'"), ({"name": None}, "name"),
        ({"version": "1"}, "version='1'.*a whole number, or None"), ({"version": 1.5}, "version"),
        ({"version": True}, "version"), ({"version": 7, "resources_id": "none"}, "Version 7 .*None can be had"),
        ({"threshold": "high"}, "threshold"), ({"threshold": float("inf")}, "threshold"),
        ({"failure_reward": None}, "failure_reward"), ({"failure_reward": float("nan")}, "failure_reward"),
        ({"eval_share": 0}, "eval_share=0"), ({"eval_share": 1.5}, "write 0.015"), ({"eval_share": 25}, "write 0.25"),
        ({"eval_share": "half"}, "eval_share"), ({"overtaken": "cancel"}, "'finish' or 'drop'"),
        ({"overtaken": "dropp"}, "did you mean 'drop'"), ({"config": 5}, "config"), ({"queue": ""}, "queue"),
        ({"priority": "high"}, "priority"), ({"tags": {"env": 1}}, "name environment"), ({"tags": {"eval": 1}}, "eval"),
        ({"tags": {f"t{n}": n for n in range(15)}}, "tags"), ({"resources_id": 3}, "resources_id"),
    ],
)  # fmt: skip
async def test_wrong_arguments_are_named_and_change_nothing(
    make_memory_store: MakeMemoryStore, given: dict[str, Any], words: str | None
) -> None:
    """With what was expected, before anything happens."""
    store: Any = make_memory_store()
    right = {"name": "bench", "items": [1, 2]} | given
    if words is None:
        await store.evaluate(right.pop("name"), right.pop("items"), **right)
        return
    with pytest.raises(rs.StoreError) as caught:
        await store.evaluate(right.pop("name"), right.pop("items"), **right)
    assert re.search(words, str(caught.value)), str(caught.value)
    assert await store.evaluations() == [] and not (await store.statistics())["total_rollouts"]


async def test_what_never_ends_is_refused(make_memory_store: MakeMemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """After so many items as there may be."""
    monkeypatch.setattr("raystore.client.evaluation.MOST_ITEMS", 50)
    store = make_memory_store()
    with pytest.raises(rs.InvalidValueError, match="never ends"):
        await store.evaluate("bench", forever())
    assert await store.evaluations() == []


def test_a_feed_checks_its_share(make_memory_store: MakeMemoryStore) -> None:
    """When it is made."""
    with pytest.raises(rs.InvalidValueError, match="eval_share=2"):
        make_memory_store().feed("train", [1], **RIGHT, eval_share=2)


async def test_a_freed_version_is_refused(store: AnyStore) -> None:
    """Said too late: the error says which are there, and what to do."""
    feed = store.feed("train", [1], **RIGHT)
    for version in range(3):
        await feed.publish([float(version)] * 100, version=version)
    with pytest.raises(rs.VersionNotFoundError, match=r"can be had are 2\. .*right after publish"):
        await feed.evaluate([1], version=0)
    await feed.publish(version=3)  # weights that travel by other ways: the version alone is kept
    await feed.publish(version=4)
    assert (await feed.evaluate([1], version=3)).version == 3
    await feed.close()


async def test_cancelling_a_group_by_hand_counts_as_failed(store: AnyStore) -> None:
    """What a user cancels of an evaluation stays in the denominator."""
    evaluation = await store.evaluate("bench", [1, 2])
    await store.cancel_rollouts(group_id="bench@-/0")
    async with running(store, lambda rollout: 1.0):
        found = await evaluation.result(timeout=30)
    assert (found.overall.samples, found.overall.failed, found.overall.mean) == (2, 1, 0.5)


async def test_errors_of_evaluations_travel(store: AnyStore) -> None:
    """They can be pickled, and say the same."""
    await store.evaluate("bench", [1])
    for call in (store.evaluate("bench", [2]), store.drop_evaluation("none"),
                 store.evaluate("x", [1], resources_id="p", version=3)):  # fmt: skip
        with pytest.raises(rs.StoreError) as caught:
            await call
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


async def test_why_a_sample_waits(store: AnyStore) -> None:
    """For its share, while other work waits too."""
    await store.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input=n) for n in range(8)])
    await store.evaluate("bench", [1, 2], samples=2, eval_share=0.1)
    claimed = await store.dequeue_many_rollouts(limit=4)
    waiting = next(one for one in await store.query_rollouts(mode="val") if one.status == "queuing")
    first = (await store.why(rollout_id=waiting.rollout_id))[0]
    assert first.kind == "evaluation_share" and "1 of 4 rollouts that run" in first.text and len(claimed) == 4
    group = await store.why(group_id=present(waiting.group_id))
    assert any(one.kind == "evaluation_share" for one in group)


async def test_a_repeated_evaluation_of_other_objects_of_the_same_content(store: AnyStore) -> None:
    """Items are compared by their content, as a restarted process makes them anew."""
    tasks = [rs.PromptTemplate(template=f"t{n}", engine="f-string") for n in range(3)]
    await store.evaluate("bench", tasks)
    again = [rs.PromptTemplate(template=f"t{n}", engine="f-string") for n in range(3)]
    assert (await (await store.evaluate("bench", again)).status()).enqueued == 3


async def test_threads_and_loops_of_their_own(store: AnyStore) -> None:
    """A handle may be used on another event loop than the one that made it."""
    evaluation = await store.evaluate("bench", [1])
    found = await asyncio.to_thread(lambda: asyncio.run(evaluation.status()))
    assert found.status == "running" and repr(evaluation) == "<Evaluation 'bench' of version None>"


async def test_a_handle_may_be_sent_to_another_process(store: AnyStore) -> None:
    """Of a store on Ray; one in memory says why it cannot."""
    evaluation = await store.evaluate("bench", [1])
    if isinstance(store, rs.InMemoryLightningStore):
        with pytest.raises(TypeError, match=r"raystore\.start"):
            pickle.dumps(evaluation)
        return
    again = pickle.loads(pickle.dumps(evaluation))
    assert (await again.status()).status == "running" and await again.drop()
