"""A feed as a trainer uses it, on every store: whole groups of a dataset's items, batch by batch."""

from __future__ import annotations

import asyncio
import gc
import logging
import pickle
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

import raystore as rs
from raystore import semconv
from raystore.client import feed as client_feed
from tests.conftest import MakeMemoryStore
from tests.feed.conftest import RIGHT, Failed, running, spans_of, trained
from tests.helpers import AnyStore, make_span, present, until

pytestmark = pytest.mark.timeout(60)


def items_of(batches: list[list[rs.FeedGroup]]) -> list[Any]:
    return [group.input for groups in batches for group in groups]


def pump_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("raystore-feed")]


# -- the loop ----------------------------------------------------------------------------------------------------------


async def test_each_item_is_trained_once(store: AnyStore) -> None:
    """In whole groups, by the policy that was published; the loop ends with the data."""
    feed = store.feed("train", list(range(10)), **RIGHT | {"batch": 3})
    async with running(store, lambda rollout: 1.0):
        batches = await trained(feed)
    assert sorted(items_of(batches)) == list(range(10))
    assert [len(groups) for groups in batches] == [3, 3, 3, 1]
    for step, groups in enumerate(batches):
        for group in groups:
            assert len(group.train) == 2 and group.rewards == [1.0, 1.0] and group.tokens == 10
            assert group.group_id == f"train/0/{group.index}" and group.environment == "train" and group.epoch == 0
            assert all(rollout.tags == {"env": "train"} and rollout.mode == "train" for rollout in group.train)
            assert all(branch == 0 and version is not None and version <= step for branch, version in group.versions)
            assert group.lag.total == group.lag.in_flight + group.lag.in_queue <= 1
    status = await feed.status()
    assert status.over and status.streams[""].endings == {"trained": 10} and status.free == status.places == 6


async def test_what_is_acknowledged_is_in_the_ledger(store: AnyStore) -> None:
    """With the metrics of the step, or those of the rollout."""
    feed = store.feed("train", [1, 2], **RIGHT)
    async with running(store, lambda rollout: 1.0):
        await feed.publish(version=0)
        async for batch in feed.batches():
            first = batch.rollouts[0].rollout_id
            with pytest.raises(rs.InvalidValueError, match="per_rollout key"):
                await batch.ack(step=1, per_rollout={"another": {}})
            with pytest.raises(rs.InvalidValueError, match="metrics"):
                await batch.ack(step=1, metrics={"x": object()})
            await batch.ack(step=1, metrics={"loss": 0.5}, per_rollout={first: {"kl": 0.1}})
    notes = {entry.rollout_id: (entry.step, entry.note) for entry in await store.ledger("train")}
    assert notes.pop(first) == (1, '{"kl": 0.1}')
    assert set(notes.values()) == {(1, '{"loss": 0.5}')} and len(notes) == 3


async def test_a_batch_has_a_manifest(store: AnyStore) -> None:
    """Plain data: what it is made of."""
    feed = store.feed("train", {"a": [1], "b": [2]}, **RIGHT)
    async with running(store, lambda rollout: float(rollout.input)):
        await feed.publish(version=7)
        async for batch in feed.batches():
            manifest = rs.BatchManifest.model_validate_json(batch.manifest.model_dump_json())
            await batch.ack(step=8)
    assert manifest.feed == "train" and manifest.number == 1 and manifest.tokens == 20
    by_name = {group.environment: group for group in manifest.groups}
    assert by_name["a"].rewards == [1.0, 1.0] and by_name["b"].group_id == "train/b/0/0"
    assert by_name["a"].versions == [(0, 7), (0, 7)] and by_name["a"].lag == rs.Lag(total=0, in_flight=0, in_queue=0)
    assert by_name["a"].rollout_ids == [rollout.rollout_id for rollout in batch.groups[0].train] or True


async def test_agents_run_with_what_was_published(store: AnyStore) -> None:
    """A value as "weights"; resources by name; of a function only the version."""
    feed = store.feed("train", list(range(6)), **RIGHT | {"batch": 1, "max_lag": 0})
    published: list[Any] = [{"layer": [1.0]}, {"p": rs.PromptTemplate(template="x", engine="f-string")}, len, None]
    seen: dict[int, Any] = {}

    async def agent(rollout: Any) -> float:
        update = present(await store.get_resources_by_id("policy", rollout.attempt.resources_version))
        seen[rollout.attempt.policy_version] = dict(update.resources)
        return 1.0

    async with running(store, agent):
        await feed.publish(published[0], version=0)
        step = 0
        async for batch in feed.batches():
            step += 1
            if step == len(published):
                break
            await feed.publish(published[step], version=step)
            await batch.ack(step=step)
        await batch.nack()
    assert seen[0]["weights"].get() == {"layer": [1.0]} and seen[1] == published[1] and seen[2] == seen[3] == {}


async def test_the_pump_does_not_need_the_loop(store: AnyStore) -> None:
    """A training step blocks the driver's event loop: items are drawn and judged all the same."""
    feed = store.feed("train", list(range(8)), **RIGHT | {"max_lag": 1})
    drawn = []

    class Data(list[int]):
        def __getitem__(self, index: Any) -> Any:
            drawn.append(time.monotonic())
            return super().__getitem__(index)

    feed = store.feed("blocked", Data(range(8)), **RIGHT | {"max_lag": 1})
    await feed.publish(version=0)
    until_drawn = time.monotonic() + 10
    while len(drawn) < 4 and time.monotonic() < until_drawn:
        time.sleep(0.02)  # noqa: ASYNC251 - as a training step does
    assert len(drawn) >= 4


async def test_a_dataset_is_read_no_further_than_admitted(store: AnyStore) -> None:
    """One of a million items costs nothing to begin with."""
    reads = []

    class Data:
        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, index: int) -> int:
            reads.append(index)
            return index

    feed = store.feed("train", Data(), **RIGHT | {"max_lag": 2})
    async with running(store, lambda rollout: 1.0):
        await trained(feed, steps=2)
    assert len(set(reads)) <= 16 + 2 * 2 + 6


async def test_epochs_come_one_after_the_other(store: AnyStore) -> None:
    """Each in an order of its own; in a second life of the feed there may be more."""
    feed = store.feed("train", list(range(5)), **RIGHT, epochs=2)
    async with running(store, lambda rollout: 1.0):
        batches = await trained(feed)
        epochs = [group.epoch for groups in batches for group in groups]
        assert Counter(epochs) == {0: 5, 1: 5} and sorted(items_of(batches)) == sorted([*range(5)] * 2)
        await feed.close()
        again = store.feed("train", list(range(5)), **RIGHT, epochs=3)
        await again.restore(len(batches))
        await again.publish(version=100)
        more = [batch.groups async for batch in _acknowledged(again, 101)]
    assert sorted(items_of(more)) == list(range(5)) and {group.epoch for groups in more for group in groups} == {2}


async def _acknowledged(feed: rs.Feed, step: int, **how: Any) -> Any:
    """The batches of a feed, each acknowledged after its use."""
    async for batch in feed.batches(**how):
        yield batch
        await batch.ack(step=step)
        step += 1


async def test_an_iterable_is_read_forward(store: AnyStore) -> None:
    """A generator, until it ends."""
    feed = store.feed("train", iter(range(7)), **RIGHT)
    async with running(store, lambda rollout: 1.0):
        assert sorted(items_of(await trained(feed))) == list(range(7))


async def test_items_that_cannot_be_read_are_skipped(store: AnyStore, caplog: pytest.LogCaptureFixture) -> None:
    """They are counted, and the reason is logged once for each kind."""

    class Data(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            if index % 3 == 0:
                raise OSError(f"no file {index}")
            return super().__getitem__(index)

    feed = store.feed("train", Data([0, 1, 2, 3, lambda: 1 / 0, None]), **RIGHT)
    async with running(store, lambda rollout: 1.0):
        batches = await trained(feed)
    assert sorted(group.index for groups in batches for group in groups) == [1, 2, 4]
    status = await feed.status()
    assert status.streams[""].endings == {"trained": 3, "skipped": 3} and status.over
    assert len([record for record in caplog.records if "passes over" in record.message]) == 2


async def test_a_full_queue_is_waited_for(make_memory_store: MakeMemoryStore) -> None:
    """Groups are enqueued as there is room for them; one that never fits is an error."""
    store = make_memory_store(max_queued=5)
    feed = store.feed("train", iter(range(12)), **RIGHT | {"max_lag": 3})
    async with running(store, lambda rollout: 1.0):
        assert sorted(items_of(await trained(feed))) == list(range(12))
        feed = store.feed("large", [1, 2], **RIGHT | {"size": 6})
        with pytest.raises(rs.OverloadedError, match="can never succeed"):
            await trained(feed)


async def test_a_dataset_of_which_nothing_can_be_read(store: AnyStore) -> None:
    """Is said to be broken."""
    feed = store.feed("train", [None] * 5, **RIGHT, epochs=None)
    with pytest.raises(rs.FeedClosedError, match="items that can be read; 5 in a row cannot"):
        await trained(feed)


# -- keep, require, order ----------------------------------------------------------------------------------------------


async def test_batches_fill_with_what_is_kept(store: AnyStore) -> None:
    """Groups without a difference are filtered, and others come in their place."""

    def agent(rollout: Any) -> float:
        return float(rollout.input % 2 and rollout.rollout_id < other.setdefault(rollout.group_id, rollout.rollout_id))

    other: dict[str, str] = {}
    feed = store.feed("train", list(range(20)), **RIGHT | {"size": 4})

    async def alternating(rollout: Any) -> float:
        members = (await store.query_groups(group_id_in=[rollout.group_id]))[0].members
        return float(rollout.input % 2 and members.index(rollout.rollout_id) % 2)

    async with running(store, alternating):
        batches = await trained(feed, keep=rs.keep(std=1e-6))
    assert sorted(items_of(batches)) == list(range(1, 20, 2))
    assert [len(groups) for groups in batches] == [2] * 5
    assert all(sorted(present(r) for r in g.rewards) == [0, 0, 1, 1] for groups in batches for g in groups)
    assert (await feed.status()).streams[""].endings == {"trained": 10, "filtered": 10}
    filtered = (await store.query_groups(status_in=["filtered"]))[0]
    assert filtered.why == "standard deviation of rewards is 0, not above 1e-06"


async def test_keep_by_the_name_of_a_reward(store: AnyStore) -> None:
    """Which agents report beside the reward; a name that none has is an error that lists them."""

    def agent(rollout: Any) -> list[rs.Span]:
        return spans_of(rollout, 1.0, correct=float(rollout.input), length=3.0)

    feed = store.feed("train", [0, 1, 2, 3], **RIGHT)
    async with running(store, agent):
        batches = await trained(feed, keep=rs.keep(successes=(1, 2), of="correct"))
        assert sorted(items_of(batches)) == [1, 2, 3] and batches[0][0].rewards_of("length") == [3.0, 3.0]
        feed = store.feed("other", [0, 1, 2, 3], **RIGHT)
        with pytest.raises(rs.InvalidValueError, match="of='corect'.*'correct', 'length' or 'reward'; did you mean"):
            await trained(feed, keep=rs.keep(std=0.1, of="corect"))


async def test_keep_by_a_function(store: AnyStore) -> None:
    """It is given the whole group, on the feed's thread."""
    threads = set()

    def keep(group: rs.FeedGroup) -> bool:
        threads.add(threading.current_thread().name)
        assert group.rewards_of("reward") == [1.0, 1.0] and len(group.train) == 2
        return bool(group.input % 2)

    feed = store.feed("train", list(range(6)), **RIGHT | {"max_lag": 3}, require=())
    async with running(store, lambda rollout: 1.0):
        batches = await trained(feed, keep=keep)
    assert sorted(items_of(batches)) == [1, 3, 5] and threads == {"raystore-feed-train"}
    for wrong in (5, test_keep_by_a_function):
        with pytest.raises(rs.InvalidValueError, match="keep"):
            feed.batches(keep=wrong)  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize(("answer", "words"), [(None, "keep"), (3, "True or False")])
async def test_keep_must_answer(store: AnyStore, answer: Any, words: str) -> None:
    """None is no answer: a function that forgot to return would filter everything."""
    feed = store.feed("train", [1, 2], **RIGHT)
    async with running(store, lambda rollout: 1.0):
        with pytest.raises(rs.InvalidValueError, match=words):
            await trained(feed, keep=lambda group: answer)


async def test_a_function_that_raises_ends_the_feed(store: AnyStore) -> None:
    """The loop gets the error, and another feed goes on where it was."""

    def keep(group: rs.FeedGroup) -> bool:
        raise KeyError("level")

    feed = store.feed("train", [1, 2, 3], **RIGHT)
    async with running(store, lambda rollout: 1.0):
        with pytest.raises(rs.FeedClosedError, match=r"keep \(keep\) raised KeyError: 'level'") as caught:
            await trained(feed, keep=keep)
        assert isinstance(caught.value.__cause__, KeyError)
        with pytest.raises(rs.FeedClosedError, match="level"):
            await feed.publish(version=1)
        again = store.feed("train", [1, 2, 3], **RIGHT)
        assert sorted(items_of(await trained(again))) == [1, 2, 3]


async def test_what_lacks_evidence_is_left_out(store: AnyStore, caplog: pytest.LogCaptureFixture) -> None:
    """A recorded call without what is required; a rollout without any call is fine."""

    def agent(rollout: Any) -> list[rs.Span]:
        if rollout.input == 0:
            return spans_of(rollout, 1.0)[1:]
        call, reward = spans_of(rollout, 1.0)
        if rollout.input == 1:
            del call.attributes[semconv.OUTPUT_LOGPROBS]
        elif rollout.input == 2:
            del call.attributes[semconv.INPUT_TOKEN_IDS]
        elif rollout.input == 3:
            call.attributes["gen_ai.request.temperature"] = 1.0
        return [call, reward]

    feed = store.feed("train", list(range(5)), **RIGHT, budget=None)
    async with running(store, agent):
        assert sorted(items_of(await trained(feed))) == [0, 3, 4]
        assert (await feed.status()).streams[""].endings == {"trained": 3, "failed": 2}
        feed = store.feed("sampling", list(range(5)), **RIGHT, budget=None, require=["sampling"])
        assert sorted(items_of(await trained(feed))) == [0, 3]
        feed = store.feed("nothing", list(range(5)), **RIGHT, require=None)
        assert sorted(items_of(await trained(feed))) == list(range(5))
    told = [record.message for record in caplog.records if "does not train on" in record.message]
    assert len(told) == 2 and "2 rollouts" in told[0] and "require=" in told[0]


async def test_in_order(store: AnyStore) -> None:
    """Batches have the items in their order, whoever was quicker."""

    async def agent(rollout: Any) -> float:
        await asyncio.sleep(0.1 * (rollout.input % 3))
        return 1.0

    feed = store.feed("train", list(range(9)), **RIGHT, order="in_order", seed=None)
    async with running(store, agent):
        assert items_of(await trained(feed)) == list(range(9))


async def test_an_order_of_ones_own(store: AnyStore) -> None:
    """The function sees complete groups, and says which come next."""

    def largest(groups: list[rs.FeedGroup]) -> list[rs.FeedGroup]:
        return sorted(groups, key=lambda group: -group.input)

    feed = store.feed("train", list(range(6)), **RIGHT | {"max_lag": 2}, order=largest)
    async with running(store, lambda rollout: 1.0):
        batches = await trained(feed)
    assert sorted(items_of(batches)) == list(range(6))
    assert all(groups[0].input > groups[1].input for groups in batches) or len(batches) == 3
    feed = store.feed("other", list(range(6)), **RIGHT, order=lambda groups: [])
    async with running(store, lambda rollout: 1.0):
        with pytest.raises(rs.InvalidValueError, match="at least one of the groups"):
            await trained(feed)


async def test_a_mix_holds_for_batches(store: AnyStore) -> None:
    """Whatever is quicker or fails more often."""

    async def agent(rollout: Any) -> float:
        if rollout.tags["env"] == "slow":
            await asyncio.sleep(0.05)
        return 1.0

    data = {"slow": list(range(30)), "quick": list(range(30))}
    feed = store.feed("train", data, **RIGHT | {"batch": 4}, mix={"slow": 0.75, "quick": 0.25})
    async with running(store, agent):
        batches = await trained(feed, steps=6)
    assert [Counter(group.environment for group in groups) for groups in batches] == [{"slow": 3, "quick": 1}] * 6


async def test_a_sampler_of_ones_own(store: AnyStore) -> None:
    """It gives the items, and learns how each ended."""

    class Sampler:
        def __init__(self) -> None:
            self.given, self.seen = 0, dict[str, tuple[str, list[float | None]]]()

        def next(self) -> int | None:
            self.given += 1
            return self.given if self.given <= 6 else None

        def observe(self, group_id: str, ending: str, rewards: list[float | None]) -> None:
            self.seen[group_id] = ending, rewards

    sampler = Sampler()
    feed = store.feed("train", None, **RIGHT, sampler=sampler)
    async with running(store, lambda rollout: float(rollout.input)):
        batches = await trained(feed, keep=lambda group: group.input != 2)
        assert sorted(items_of(batches)) == [1, 3, 4, 5, 6]

        async def all_seen() -> bool:
            return len(sampler.seen) == 6

        await until(all_seen)
    assert sampler.seen["train/0/1"] == ("filtered", [2.0, 2.0]) and sampler.seen["train/0/0"] == (
        "trained",
        [1.0, 1.0],
    )


async def test_batches_are_packed_by_tokens(store: AnyStore) -> None:
    """A batch has fewer groups if more would exceed the bound."""
    feed = store.feed("train", list(range(6)), **RIGHT | {"batch": 3, "max_lag": 2}, batch_tokens=25)
    async with running(store, lambda rollout: 1.0):
        batches = await trained(feed)
    assert [len(groups) for groups in batches] == [2, 2, 2]  # 10 tokens each


# -- outcomes ----------------------------------------------------------------------------------------------------------


async def first_fails(store: AnyStore, rollout: Any, outcome: str = "agent_error") -> float:
    """The first member of each group fails."""
    group = (await store.query_groups(group_id_in=[rollout.group_id]))[0]
    if group.members[0] == rollout.rollout_id:
        raise Failed(outcome)
    return 1.0


async def test_failures_count_with_a_reward(store: AnyStore) -> None:
    """They are trained on with it, and vote."""
    feed = store.feed("train", list(range(3)), **RIGHT, on_failure=rs.reward(-1), budget=None)
    async with running(store, lambda rollout: first_fails(store, rollout)):
        batches = await trained(feed, keep=rs.keep(std=0.5))
    groups = [group for groups in batches for group in groups]
    assert len(groups) == 3 and all(group.rewards == [-1.0, 1.0] for group in groups)
    assert all([r.status for r in group.train] == ["failed", "succeeded"] for group in groups)
    assert all(group.failed == [group.train[0].rollout_id] for group in groups)


async def test_failures_are_left_out(store: AnyStore) -> None:
    """They neither train nor vote; a group that has too few left has failed."""
    feed = store.feed("train", list(range(3)), **RIGHT | {"size": 3}, on_failure="mask", budget=None)
    async with running(store, lambda rollout: first_fails(store, rollout)):
        batches = await trained(feed)
        groups = [group for groups in batches for group in groups]
        assert len(groups) == 3 and all(group.rewards == [1.0, 1.0] and len(group.train) == 2 for group in groups)
        feed = store.feed("all", list(range(3)), **RIGHT | {"size": 3}, min_size=3, budget=None)
        assert await trained(feed) == []
    assert (await feed.status()).streams[""].endings == {"failed": 3}


async def test_failures_are_replaced(store: AnyStore) -> None:
    """If the user insists."""
    with pytest.warns(UserWarning, match="never learns"):
        feed = store.feed("train", list(range(3)), **RIGHT, on_failure="replace", budget=None)
    async with running(store, lambda rollout: first_fails(store, rollout)):
        batches = await trained(feed)
    groups = [group for groups in batches for group in groups]
    assert len(groups) == 3 and all(len(group.members) == 3 and group.rewards == [1.0, 1.0] for group in groups)


async def test_a_race_takes_the_first(store: AnyStore) -> None:
    """And marks its groups."""

    async def agent(rollout: Any) -> float:
        group = (await store.query_groups(group_id_in=[rollout.group_id]))[0]
        await asyncio.sleep(20 if group.members[0] == rollout.rollout_id else 0)
        return 1.0

    with pytest.warns(UserWarning, match="short answers"):
        feed = store.feed("train", [1, 2], **RIGHT, race=True, spare=1)
    async with running(store, agent):
        ((one, two),) = await trained(feed)
    assert one.is_raced and two.is_raced and len(one.train) == 2 and one.members[0] not in one.valid_rewards


async def test_the_failure_budget(store: AnyStore) -> None:
    """Once it is spent the loop is told why, with the commonest errors, and goes on when somebody says so."""
    broken = [True]

    def agent(rollout: Any) -> float:
        if broken[0]:
            raise Failed
        return 1.0

    feed = store.feed("train", list(range(40)), **RIGHT, budget=rs.FailureBudget(in_a_row=3))
    async with running(store, agent):
        with pytest.raises(rs.FailureBudgetError, match="failed in a row.*it agent_error") as caught:
            await trained(feed)
        text, count, rollout_id = caught.value.errors[0]
        assert "agent_error" in text and count >= 3 and rollout_id.startswith("ro-")
        assert (await feed.status()).spent is not None
        broken[0] = False
        await feed.resume()
        batches = [batch.groups async for batch in _acknowledged(feed, 1)]
    status = await feed.status()
    assert status.over and sum(status.streams[""].endings.values()) == 40 and len(items_of(batches)) >= 30


async def test_too_many_filtered(store: AnyStore) -> None:
    """A loop that would never see a batch is told so."""
    feed = store.feed("train", list(range(40)), **RIGHT, max_filtered=5)
    async with running(store, lambda rollout: 1.0):
        with pytest.raises(rs.FilteredTooManyError, match="max_filtered is 5.*standard deviation"):
            await trained(feed, keep=rs.keep(std=0.1))


# -- lag ---------------------------------------------------------------------------------------------------------------


async def one_is_slow(store: AnyStore, feed: rs.Feed, steps: int) -> list[list[rs.FeedGroup]]:
    """Train while the rollouts of item 0 wait until so many batches are trained."""
    released = asyncio.Event()

    async def agent(rollout: Any) -> float:
        if rollout.input == 0:
            await asyncio.wait_for(released.wait(), 20)
        return 1.0

    def count(batch: rs.FeedBatch) -> None:
        if batch.number >= steps:
            released.set()

    async with running(store, agent):
        return await trained(feed, after=count)


async def test_late_wait(store: AnyStore) -> None:
    """The batch before a group would be late waits for it."""
    feed = store.feed("train", list(range(10)), **RIGHT, late="wait", seed=None)
    batches = await one_is_slow(store, feed, 1)
    place = next(n for n, groups in enumerate(batches) if 0 in [group.input for group in groups])
    assert place <= 1 and max(group.lag.total for groups in batches for group in groups) <= 1
    assert sorted(items_of(batches)) == list(range(10))


async def test_late_train(store: AnyStore) -> None:
    """It is trained on when it comes, and its lag is told."""
    feed = store.feed("train", list(range(10)), **RIGHT, late="train", seed=None)
    batches = await one_is_slow(store, feed, 3)
    slow = next(group for groups in batches for group in groups if group.input == 0)
    assert slow.lag.total >= 3 and slow.lag.in_flight >= 2 and sorted(items_of(batches)) == list(range(10))


async def test_late_drop(store: AnyStore) -> None:
    """It is given up."""
    feed = store.feed("train", list(range(10)), **RIGHT, late="drop", seed=None)
    batches = await one_is_slow(store, feed, 3)
    assert sorted(items_of(batches)) == list(range(1, 10))
    assert (await feed.status()).streams[""].endings == {"trained": 9, "stale": 1}


async def test_late_requeue(store: AnyStore) -> None:
    """Its item is enqueued again, as a group that names the old one."""
    feed = store.feed("train", list(range(10)), **RIGHT, late="requeue", seed=None)
    batches = await one_is_slow(store, feed, 3)
    slow = next(group for groups in batches for group in groups if group.input == 0)
    assert sorted(items_of(batches)) == list(range(10)) and slow.requeued_from is not None and slow.lag.total <= 1


# -- versions, restore, who holds it -----------------------------------------------------------------------------------


async def test_nothing_is_handed_out_before_the_first_publish(
    store: AnyStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for a batch is told."""
    monkeypatch.setattr(client_feed, "UNPUBLISHED_SECONDS", 0.2)
    feed = store.feed("train", [1, 2], **RIGHT)
    async with running(store, lambda rollout: 1.0):
        waiting = asyncio.ensure_future(anext(aiter(feed.batches())))
        await asyncio.sleep(0.6)
        assert not waiting.done()
        told = [record.message for record in caplog.records if "hands out nothing until publish" in record.message]
        assert len(told) == 1 and "'train'" in told[0]
        await feed.publish(version=0)
        batch = await waiting
        assert len(batch.groups) == 2


async def test_versions_are_published_once(store: AnyStore) -> None:
    """The same again is no conflict; other content, or an earlier version, is."""
    feed = store.feed("train", [1, 2], **RIGHT)
    await feed.publish([1.0], version=3)
    await feed.publish([1.0], version=3)
    with pytest.raises(rs.VersionConflictError, match="other content"):
        await feed.publish([2.0], version=3)
    with pytest.raises(rs.VersionConflictError, match="version 2"):
        await feed.publish([1.0], version=2)
    for wrong in (-1, None, "3"):
        with pytest.raises(rs.InvalidValueError, match="version"):
            await feed.publish([1.0], version=wrong)  # type: ignore[arg-type]  # wrong on purpose


async def test_restore(store: AnyStore) -> None:
    """Undone batches come again first and as they were, by weights of a new branch; each item is trained once."""
    feed = store.feed("train", list(range(20)), **RIGHT)
    async with running(store, lambda rollout: 1.0):
        assert await feed.restore(None) == 0
        first = await trained(feed, steps=4)
        await feed.checkpoint(2)
        with pytest.raises(rs.BatchConflictError):
            await feed.restore(1)
        assert await feed.restore(2) == 4
        await feed.publish([5.0], version=2)
        again = [batch.groups async for batch in _acknowledged(feed, 3)]
    assert [g.group_id for groups in again[:2] for g in groups] == [g.group_id for groups in first[2:] for g in groups]
    assert sorted(items_of(first[:2]) + items_of(again)) == list(range(20))
    assert {branch for groups in again[3:] for group in groups for branch, _ in group.versions} <= {0, 1}
    assert again[-1][0].versions[0][0] == 1
    assert (await feed.status()).branch == 1


async def test_without_a_saved_model_all_comes_again(store: AnyStore) -> None:
    """A crash before the first checkpoint: no step is durable."""
    feed = store.feed("train", list(range(6)), **RIGHT)
    async with running(store, lambda rollout: 1.0):
        await trained(feed, steps=2)
        assert await feed.restore(None) == 4
        batches = await trained(feed)
    assert sorted(items_of(batches)) == list(range(6))


async def test_a_feed_is_held_by_one(store: AnyStore) -> None:
    """Until it is closed; in this process and in others."""
    feed = store.feed("train", [1, 2], **RIGHT)
    await feed.publish([0.0], version=0)
    with pytest.raises(rs.FeedHeldError, match="this process"):
        store.feed("train", [1, 2], **RIGHT)
    store.feed("another", [1, 2], **RIGHT)
    await feed.close()
    with pytest.raises(rs.FeedClosedError, match="it was closed"):
        await feed.publish(version=1)
    with pytest.raises(rs.FeedClosedError, match="it was closed"):
        await anext(aiter(feed.batches()))
    again = store.feed("train", [1, 2], **RIGHT)
    async with running(store, lambda rollout: 1.0):
        assert sorted(items_of(await trained(again))) == [1, 2]


async def test_a_changed_dataset_is_refused(store: AnyStore) -> None:
    """Unless its user says to go on."""
    feed = store.feed("train", list(range(6)), **RIGHT)
    async with running(store, lambda rollout: 1.0):
        await trained(feed, steps=1)
        await feed.close()
        for other in (list(range(7)), [0, 1, 2, 3, 4, 6]):
            changed = store.feed("train", other, **RIGHT)
            with pytest.raises(rs.DatasetChangedError, match="changed='continue'"):
                await changed.publish(version=1)
        going = store.feed("train", list(range(7)), **RIGHT, changed="continue")
        await going.restore(1)
        await going.publish(version=1)
        more = [batch.groups async for batch in _acknowledged(going, 2)]
    assert sum(map(len, more)) >= 4


# -- batches -----------------------------------------------------------------------------------------------------------


async def test_a_batch_must_be_acknowledged(store: AnyStore) -> None:
    """Before the next one, unless more may be open."""
    feed = store.feed("train", list(range(8)), **RIGHT | {"max_lag": 3})
    async with running(store, lambda rollout: 1.0):
        await feed.publish(version=0)
        batches = feed.batches()
        first = await anext(batches)
        with pytest.raises(rs.BatchHeldError):
            await anext(batches)
        ahead = feed.batches(max_open=3)
        second, third = await anext(ahead), await anext(ahead)
        await second.nack()
        again = await anext(ahead)
        assert [g.group_id for g in again.groups] == [g.group_id for g in second.groups]
        for step, batch in enumerate((first, again, third), 1):
            await batch.ack(step=step)
        with pytest.raises(rs.BatchConflictError):
            await second.ack(step=9)


async def test_the_last_batches_may_be_open(store: AnyStore) -> None:
    """A loop that fetches ahead ends, although it has not acknowledged what it has."""
    feed = store.feed("train", list(range(4)), **RIGHT)
    async with running(store, lambda rollout: 1.0):
        await feed.publish(version=0)
        held = [batch async for batch in feed.batches(max_open=2)]
        for step, batch in enumerate(held, 1):
            await batch.ack(step=step)
    assert sorted(items_of([batch.groups for batch in held])) == list(range(4)) and (await feed.status()).over


async def test_whoever_waits_may_go(store: AnyStore) -> None:
    """A cancelled wait loses no batch."""
    feed = store.feed("train", [1, 2], **RIGHT)
    await feed.publish([0.0], version=0)
    waiting = asyncio.ensure_future(anext(aiter(feed.batches())))
    await asyncio.sleep(0.3)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    async with running(store, lambda rollout: 1.0):
        assert sorted(items_of(await trained(feed))) == [1, 2]


async def test_spans_of_a_batch(store: AnyStore) -> None:
    """Those that were read to judge its groups; else they are read when asked for."""
    for name, require in list[tuple[str, Any]]([("judged", ["token_ids"]), ("not", None)]):
        feed = store.feed(name, [1, 2], **RIGHT, require=require)
        async with running(store, lambda rollout: 1.0):
            await feed.publish(version=0)
            async for batch in feed.batches():
                if require is None:
                    assert batch.groups[0].tokens is None
                    with pytest.raises(rs.InvalidValueError, match="spans were read"):
                        batch.groups[0].rewards_of("reward")
                spans = await batch.spans()
                assert set(spans) == {rollout.rollout_id for rollout in batch.rollouts}
                assert all(len(rs.triplets(found)) == 1 for found in spans.values())
                assert batch.groups[0].rewards_of("reward") == [1.0, 1.0] and batch.manifest.tokens == 20
                await batch.ack(step=1)


async def test_shards(store: AnyStore) -> None:
    """Each group is one rank's; a rank reads its spans itself."""
    feed = store.feed("train", list(range(5)), **RIGHT | {"batch": 5})
    async with running(store, lambda rollout: 1.0):
        await feed.publish(version=0)
        async for batch in feed.batches():
            shards = [batch.shard(rank, 2) for rank in range(2)]
            for wrong in ((2, 2), (-1, 2), (0, 0)):
                with pytest.raises(rs.InvalidValueError, match=r"rank|world"):
                    batch.shard(*wrong)
            assert sorted(len(shard.groups) for shard in shards) == [2, 3]
            assert sorted(i for s in shards for i in s.rollout_ids) == sorted(r.rollout_id for r in batch.rollouts)
            for shard in shards:
                travelled: rs.BatchShard = pickle.loads(pickle.dumps(shard))
                assert travelled.rollout_ids == shard.rollout_ids
                assert await shard.spans() == await travelled.spans(store)
            copied: rs.FeedBatch = pickle.loads(pickle.dumps(batch))
            assert copied.shard(1, 2).rollout_ids == shards[1].rollout_ids and copied.manifest == batch.manifest
            with pytest.raises(rs.FeedClosedError, match="say ack where it was taken"):
                await copied.ack(step=1)
            await batch.ack(step=1)


# -- ends --------------------------------------------------------------------------------------------------------------


async def test_no_thread_is_left(store: AnyStore) -> None:
    """By `async with`, by `close`, and with the store."""
    async with store.feed("a", [1, 2], **RIGHT) as feed:
        await feed.publish(version=0)
        assert pump_threads() == ["raystore-feed-a"]
    other = store.feed("b", [1, 2], **RIGHT)
    await other.publish(version=0)
    await other.close()
    await other.close()
    last = store.feed("c", [1, 2], **RIGHT)
    await last.publish(version=0)
    unused = store.feed("d", [1, 2], **RIGHT)
    waiting = asyncio.ensure_future(anext(aiter(last.batches())))
    await asyncio.sleep(0.1)
    started = time.monotonic()
    store.close()
    assert time.monotonic() - started < 4
    with pytest.raises((rs.FeedClosedError, rs.StoreClosedError)):
        await waiting
    with pytest.raises((rs.FeedClosedError, rs.StoreClosedError)):
        await unused.publish(version=0)
    await asyncio.sleep(0.1)
    assert pump_threads() == []


async def test_a_feed_that_is_closed_at_once(store: AnyStore) -> None:
    """Whatever it was about to do: the next one of its name begins."""
    for step in range(20):
        feed = store.feed("train", [1, 2], **RIGHT)
        await feed.publish([0.0], version=step)
        started = time.monotonic()
        await feed.close()
        assert time.monotonic() - started < 2


async def test_a_function_that_does_not_return_holds_nobody_up(
    store: AnyStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing goes on without it, and says so."""
    monkeypatch.setattr(client_feed, "CLOSE_SECONDS", 0.3)
    goes_on = threading.Event()

    def items() -> Iterator[int]:
        goes_on.wait(20)
        yield 1

    feed = store.feed("train", items(), **RIGHT)
    await feed.publish(version=0)
    await asyncio.sleep(0.1)
    await feed.close()
    assert any("has not returned" in record.message for record in caplog.records)
    goes_on.set()
    gc.collect()

    async def has_ended() -> bool:
        return pump_threads() == []

    await until(has_ended)


async def test_status_before_it_begins(store: AnyStore) -> None:
    """There is nothing to tell."""
    feed = store.feed("train", [1, 2], **RIGHT)
    with pytest.raises(rs.FeedNotFoundError):
        await feed.status()
    assert repr(feed) == "<Feed 'train', not begun>"
    logging.getLogger("raystore").debug("nothing else happened")
    assert make_span("ro", attempt_id="at").name and pump_threads() == []
