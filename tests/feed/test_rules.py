"""What a user says of a feed: every argument is checked at once and by name, before anything happens."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import pytest

import raystore as rs
from raystore.client.feed import deal
from raystore.types.feeds import FailureReward
from raystore.wire import feeds as wire_feeds
from tests.conftest import MakeMemoryStore

UNTYPED: Any = rs  # to be called wrongly

RIGHT: dict[str, Any] = {"resources_id": "policy", "size": 8, "batch": 4}


class Sampler:
    def next(self) -> Any:
        return 1

    def observe(self, group_id: str, ending: str, rewards: list[float | None]) -> None:
        """Learn nothing."""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"name": ""}, "name"), ({"name": "a/b"}, "without '/'"), ({"name": "x" * 300}, "200 characters"),
        ({"resources_id": None}, "resources_id"), ({"size": 0}, "size=0"), ({"size": 2.5}, "size"),
        ({"batch": 0}, "batch=0"), ({"max_lag": -1}, "max_lag=-1"), ({"max_running": 0}, "max_running=0"),
        ({"late": "weit"}, "late='weit' .* did you mean 'wait'"), ({"late": None}, "late"),
        ({"order": "oldst"}, "order='oldst'.*a function.*did you mean 'oldest'"), ({"order": 3}, "order"),
        ({"on_failure": 0}, r"write rs.reward\(0\)"), ({"on_failure": "masked"}, "did you mean 'mask'"),
        ({"min_size": 1}, "min_size=1"), ({"min_size": 9}, "min_size=9.*at most size, which is 8"),
        ({"spare": -1}, "spare=-1"), ({"race": True}, "spare=0.*race"), ({"race": "yes"}, "race"),
        ({"replace": 2}, "replace=2.*on_failure='replace'"), ({"replace": -1}, "replace=-1"),
        ({"deadline_seconds": 0}, "deadline_seconds"), ({"deadline_seconds": float("nan")}, "deadline_seconds"),
        ({"epochs": 0}, "epochs=0"), ({"seed": "a"}, "seed"), ({"mix": {"a": 1.0}}, "data by name"),
        ({"data": {"math": [1], "code": [2]}, "mix": {"math": 0.7, "cod": 0.3}}, "mix key='cod'.*'code'"),
        ({"data": {"math": [1], "code": [2]}, "mix": {"math": 0.7}}, "'code' has none"),
        ({"data": {"math": [1], "code": [2]}, "mix": {"math": 0.7, "code": 0}}, r"mix\['code'\]=0.*above 0"),
        ({"data": {"math": [1], "code": [2]}, "mix": {"math": 0.7, "code": float("inf")}}, r"mix\['code'\]"),
        ({"data": {"math": [1], "code": [2]}, "mix": [0.7, 0.3]}, "mix"), ({"data": {"a~b": [1]}}, "data key"),
        ({"data": {3: [1]}}, "data key"), ({"data": []}, "data"), ({"data": 5}, "data=5"),
        ({"sampler": Sampler()}, "data"), ({"data": None, "sampler": Sampler}, "sampler"),
        ({"data": None, "sampler": object()}, "sampler"),
        ({"data": None, "sampler": Sampler(), "mix": {"a": 1}}, "mix"),
        ({"require": "token_ids"}, r"\['token_ids'\]"), ({"require": ["tokens"]}, r"require\[0\]='tokens'.*token_ids"),
        ({"batch_tokens": 0}, "batch_tokens=0"), ({"max_filtered": 0}, "max_filtered=0"), ({"budget": 5}, "budget=5"),
        ({"config": 5}, "config"),
        ({"mode": "training"}, "mode"), ({"queue": ""}, "queue"), ({"priority": "high"}, "p"),
        ({"tags": {"env": "x"}}, "names the dataset"),
        ({"tags": {f"t{n}": n for n in range(16)}}, "tags"),
        ({"changed": "ignore"}, "'refuse' or 'continue'"),
    ],
    ids=lambda one: one if isinstance(one, str) else ",".join(one),  # no address of an object
)  # fmt: skip
def test_wrong_arguments_of_a_feed(make_memory_store: MakeMemoryStore, given: dict[str, Any], words: str) -> None:
    """The error names the value and what was expected."""
    store = make_memory_store()
    with pytest.raises(rs.InvalidValueError, match=words):
        store.feed(**{"name": "train", "data": [1, 2], **RIGHT, **given})
    assert store.sync.statistics()["total_rollouts"] == 0
    store.feed("train", [1, 2], **RIGHT)  # nothing is in its way


def test_a_call_that_does_not_fit_is_explained(make_memory_store: MakeMemoryStore) -> None:
    """As that of any method."""
    store: Any = make_memory_store()
    with pytest.raises(TypeError, match=r"feed\(\) has no argument 'max_leg'; did you mean 'max_lag'\?"):
        store.feed("train", [1], **RIGHT, max_leg=1)
    with pytest.raises(TypeError, match="needs resources_id="):
        store.feed("train", [1], size=1, batch=1)


def test_what_biases_training_warns(make_memory_store: MakeMemoryStore) -> None:
    """Where the feed is made."""
    store = make_memory_store()
    with pytest.warns(UserWarning, match="never learns not to") as caught:
        store.feed("a", [1], **RIGHT, on_failure="replace")
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="short answers come first"):
        store.feed("b", [1], **RIGHT, race=True, spare=2)
    store.feed("c", [1], **RIGHT, spare=2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: UNTYPED.reward(float("nan")), "value"), (lambda: UNTYPED.reward(float("inf")), "finite"),
        (lambda: UNTYPED.reward("0"), "value"),
        (lambda: UNTYPED.keep(), "which groups to keep"),
        (lambda: UNTYPED.keep(std=-1), "std=-1"), (lambda: UNTYPED.keep(range="a"), "range"),
        (lambda: UNTYPED.keep(std=1, of=3), "of=3"),
        (lambda: UNTYPED.keep(successes=3), "a pair"), (lambda: UNTYPED.keep(successes=(5, 1)), "successes"),
        (lambda: UNTYPED.keep(successes=(-1, 1)), "successes"),
        (lambda: UNTYPED.FailureBudget(in_a_row=0), "in_a_row=0"),
        (lambda: UNTYPED.FailureBudget(share=0), "share=0"), (lambda: UNTYPED.FailureBudget(share=2), "share"),
        (lambda: UNTYPED.FailureBudget(window=0), "window=0"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_where_they_are_made(make: Any, words: str) -> None:
    """Not later, by the feed."""
    with pytest.raises(rs.InvalidValueError, match=words):
        make()


def test_a_reward_shows_how_it_is_made() -> None:
    """And travels."""
    assert repr(rs.reward(0)) == "rs.reward(0)" and pickle.loads(pickle.dumps(rs.reward(1))) == FailureReward(1.0)


# -- keep --------------------------------------------------------------------------------------------------------------


def group(rewards: Sequence[float | None], *, failed: int = 0, **named: Sequence[float | None]) -> rs.FeedGroup:
    """A group of so many members with these rewards, the last of which failed and count nevertheless."""
    rollouts = [rs.Rollout(rollout_id=f"r{n}", input=1, start_time=0.0, reward=x) for n, x in enumerate(rewards)]
    ids = [rollout.rollout_id for rollout in rollouts]
    by_name: dict[str, dict[str, float]] = {one: {} for one in ids}
    for name, values in named.items():
        for one, value in zip(ids, values, strict=True):
            by_name[one] |= {} if value is None else {name: value}
    return rs.FeedGroup(
        group_id="g", input=1, n=len(rollouts), start_time=0.0, rollouts=rollouts, environment="e", epoch=0, index=0,
        lag=rs.Lag(total=0, in_flight=0, in_queue=0), versions=[(0, 0)] * len(rollouts),
        valid_rewards=dict(zip(ids, rewards, strict=True)), named_rewards=by_name if named else None,
        failed=ids[len(ids) - failed :],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("keep", "kept", "filtered"),
    [
        ({"std": 1e-6}, [[0, 1], [0.5, 0.4, None]], [[1, 1], [0, 0, None], [None, None], [0.3]]),
        ({"std": 0.5}, [[0, 2]], [[0, 1]]), ({"range": 0.5}, [[0, 1]], [[0, 0.5], [None]]),
        ({"successes": (1, 2)}, [[1, 0, 0], [1, 2, -1]], [[0, 0, -1], [1, 1, 1], [None]]),
        ({"std": 0.1, "successes": (1, 1)}, [[1, 0]], [[1, 2], [0.0, -1.0]]),
    ],
)  # fmt: skip
def test_keep(keep: dict[str, Any], kept: list[Any], filtered: list[Any]) -> None:
    """A group passes if its rewards exceed every bound; what is None has no vote."""
    rule = rs.keep(**keep)
    for rewards in kept:
        assert rule(group(rewards)) and rule.why_not(group(rewards)) is None, rewards
    for rewards in filtered:
        assert not rule(group(rewards)) and rule.why_not(group(rewards)), rewards


def test_keep_says_why_not() -> None:
    """With the number and the bound."""
    assert rs.keep(std=0.1).why_not(group([1, 1])) == "standard deviation of rewards is 0, not above 0.1"
    assert rs.keep(successes=(1, 2)).why_not(group([0, 0])) == "0 of 2 rewards are above 0, not 1 to 2"


def test_keep_of_a_reward_by_name() -> None:
    """Which agents report beside the reward; one that failed has the reward for that in each."""
    rule = rs.keep(std=0.1, of="correct")
    assert rule(group([5, 5], correct=[0, 1])) and not rule(group([0, 5], correct=[1, 1]))
    assert group([5, None, -1], failed=1, correct=[0, 1, None]).rewards_of("correct") == [0, 1, -1]
    with pytest.raises(rs.InvalidValueError, match="did you mean 'correct'"):
        rs.keep(std=0.1, of="corect")(group([5, 5], correct=[0, 1]))
    with pytest.raises(rs.InvalidValueError, match="spans were read"):
        rule(group([5, 5]))
    assert rule.why_not(group([-1, -1], failed=2, correct=[None, None])) is not None  # all failed: nobody reports it


# -- shards ------------------------------------------------------------------------------------------------------------


def test_groups_are_dealt_by_tokens() -> None:
    """Each once, in the order of the batch, and no rank has much more than another."""
    tokens = [100, 900, 300, 200, 500, 400, 800, 600]
    dealt = deal(tokens, 3)
    assert sorted(place for places in dealt for place in places) == list(range(8))
    assert all(places == sorted(places) for places in dealt)
    loads = [sum(tokens[place] for place in places) for places in dealt]
    assert max(loads) - min(loads) <= 200


def test_groups_without_tokens_are_dealt_by_number() -> None:
    """If one is not known, none is looked at; more ranks than groups leave some without."""
    assert [len(places) for places in deal([None, 900, 5, 5, 5], 2)] == [3, 2]
    assert sorted(map(len, deal([1, 1], 4))) == [0, 0, 1, 1]


# -- publishing --------------------------------------------------------------------------------------------------------


def content(**weights: Any) -> str:
    return wire_feeds.content_of({name: rs.ObjectResource(value=value) for name, value in weights.items()})


def test_content_of_weights() -> None:
    """The same for equal weights; of very large ones the size decides."""
    import numpy as np

    small = {"w": np.arange(10.0)}
    assert content(weights=small) == content(weights={"w": np.arange(10.0)}) != content(weights={"w": np.arange(11.0)})
    assert content(weights=small) != content(other=small)
    assert content(weights=[1.0, {"a": 1}]) != content(weights=[2.0, {"a": 1}])
    assert content(weights=np.random.default_rng(0)) == content(weights=np.random.default_rng(1))  # of unknown size
    large = np.zeros(wire_feeds.HASHED_BYTES // 8 + 1)
    other = large.copy()
    other[0] = 1
    assert content(weights=large) == content(weights=other) != content(weights=small)


def test_resources_by_name_are_told_from_a_state_dict() -> None:
    """Which is a mapping, too."""
    assert wire_feeds.is_named({"prompt": rs.PromptTemplate(template="x", engine="f-string")})
    assert not wire_feeds.is_named({"layer.0": [1.0]}) and not wire_feeds.is_named({}) and not wire_feeds.is_named(5)
    with pytest.raises(rs.InvalidValueError, match=r"weights\['w'\]"):
        wire_feeds.is_named({"prompt": rs.PromptTemplate(template="x", engine="f-string"), "w": 1})
