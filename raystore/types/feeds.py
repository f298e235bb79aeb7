"""What a user says of a feed, and what a feed says: its groups, what batches are made of, and where it stands.

Here are the public values and records; `LightningStore.feed` says what they are for. A group's rewards are those of its
*valid* members, which vote in a baseline; those to train on are among them.
Not here: drawing items (`client.datasets`), the feed itself (`client.feed`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import pstdev
from typing import Any, Protocol, runtime_checkable

from pydantic import BaseModel, Field

from raystore.errors import InvalidValueError
from raystore.errors.text import either, meant
from raystore.types.contract import AnyRollout, TakenGroup
from raystore.values.plain import number, scalar, whole

__all__ = [
    "BatchManifest", "FailureBudget", "FailureReward", "FeedGroup", "FeedStatus", "GroupManifest", "Keep", "Lag",
    "Sampler", "StreamStatus", "keep", "reward",
]  # fmt: skip


# -- groups of a feed --------------------------------------------------------------------------------------------------


class Lag(BaseModel, frozen=True):
    """How far behind the policy a group is, in batches that were acknowledged and not undone.

    Attributes:
        total: from the earliest claim of its rollouts to its training.
        in_flight: of these, until it was complete.
        in_queue: of these, from then on.
    """

    total: int
    in_flight: int
    in_queue: int


class FeedGroup(TakenGroup):
    """The group of one item of a feed, with the rollouts to train on.

    Attributes:
        environment: name of the dataset that the item is from.
        epoch: in which it was drawn, from 0.
        index: of the item within its dataset; of an iterable, how many items came before it in the epoch.
        lag: how far behind the policy it is.
        versions: of the policy, of each of `rollouts`: the branch, which a rewind begins anew, and the step within it;
            the step is None if it is not known.
        is_raced: whether it has the first of more rollouts than it needed (`race=True`).
        requeued_from: the group of the same item that came too late; None if there is none.
        tokens: in the sequences of its rollouts; None if their spans were not read.
        failed: ids of those of `rollouts` that failed and count by `on_failure=rs.reward(x)`.
        valid_rewards: the reward of each valid member by rollout id, those to train on first; None for one without.
        named_rewards: the rewards by name of each of them; None if their spans were not read.
    """

    environment: str
    epoch: int
    index: int
    lag: Lag
    versions: list[tuple[int, int | None]]
    is_raced: bool = False
    requeued_from: str | None = None
    tokens: int | None = None
    failed: list[str] = Field(default_factory=list)
    valid_rewards: dict[str, float | None] = Field(default_factory=dict)
    named_rewards: dict[str, dict[str, float]] | None = None

    @property
    def train(self) -> list[AnyRollout]:
        """The rollouts to train on."""
        return self.rollouts

    @property
    def rewards(self) -> list[float | None]:
        """The reward of each valid member, those of `train` first and in their order; None for one without.

        Of these a baseline is made. A member that failed has the reward of `on_failure=rs.reward(x)`, or is not valid.
        """
        return list(self.valid_rewards.values())

    def rewards_of(self, dimension: str) -> list[float | None]:
        """The same for a reward by name, as `ctx.reward(value, name=...)` gives it.

        Raises `InvalidValueError` if no member reports it, or if their spans were not read: they are if the feed has a
        `require` or a `keep`, or after `batch.spans()`.
        """
        if self.named_rewards is None:
            expected = (
                "a group whose spans were read: by require= or keep= of the feed, or `await batch.spans()` before"
            )
            raise InvalidValueError("dimension", dimension, expected)
        reporting = [self.named_rewards.get(rollout_id, {}) for rollout_id in self.valid_rewards]
        known = sorted({name for rewards in reporting for name in rewards})
        succeeded = [rollout_id for rollout_id in self.valid_rewards if rollout_id not in self.failed]
        if dimension not in known and succeeded:
            there = either([repr(name) for name in known]) or "none"
            expected = f"the name of a reward; group {self.group_id} has {there}{meant(dimension, known)}"
            raise InvalidValueError("dimension", dimension, expected)
        return [
            value if rollout_id in self.failed else rewards.get(dimension)
            for (rollout_id, value), rewards in zip(self.valid_rewards.items(), reporting, strict=True)
        ]


class GroupManifest(BaseModel):
    """What a batch had of one group.

    Attributes:
        group_id: the group.
        environment: name of its dataset.
        epoch: of its item.
        index: of its item.
        rollout_ids: of the rollouts that were trained on.
        rewards: of all valid members, those that were trained on first.
        versions: of the policy, of each rollout: branch and step.
        lag: of the group.
        tokens: in its sequences; None if they were not counted.
        is_raced: whether it has the first of more rollouts than it needed.
        requeued_from: the group of the same item that came too late; None if there is none.
    """

    group_id: str
    environment: str
    epoch: int
    index: int
    rollout_ids: list[str]
    rewards: list[float | None]
    versions: list[tuple[int, int | None]]
    lag: Lag
    tokens: int | None
    is_raced: bool
    requeued_from: str | None


class BatchManifest(BaseModel):
    """What a batch is made of, to be kept with a model: `manifest.model_dump_json()`.

    Attributes:
        feed: name of the feed.
        number: of the batch.
        groups: what it has of each group.
    """

    feed: str
    number: int
    groups: list[GroupManifest]

    @property
    def tokens(self) -> int | None:
        """In all sequences; None unless all were counted."""
        counts = [group.tokens for group in self.groups if group.tokens is not None]
        return sum(counts) if len(counts) == len(self.groups) else None


def manifest_of(feed: str, batch: int, groups: Sequence[FeedGroup]) -> BatchManifest:
    """The manifest of a batch of these groups."""
    told = ("group_id", "environment", "epoch", "index", "rewards", "versions", "lag", "tokens", "is_raced")
    return BatchManifest(
        feed=feed,
        number=batch,
        groups=[
            GroupManifest(
                rollout_ids=[rollout.rollout_id for rollout in group.rollouts],
                requeued_from=group.requeued_from,
                **{name: getattr(group, name) for name in told},
            )
            for group in groups
        ],
    )


# -- where a feed stands -----------------------------------------------------------------------------------------------


class StreamStatus(BaseModel):
    """Where a feed stands in one dataset, or in the union of several.

    Attributes:
        epoch: that is being drawn, from 0.
        cursor: how many items of it were drawn.
        length: items of an epoch; None if it is not known.
        over: whether nothing more will be drawn.
        endings: how many items ended how: trained, filtered, failed, stale, skipped, cancelled.
    """

    epoch: int
    cursor: int
    length: int | None
    over: bool
    endings: dict[str, int]


class FeedStatus(BaseModel, extra="allow"):
    """Where a feed stands.

    Attributes:
        name: of the feed.
        branch: of versions; each rewind begins one.
        version: the newest step that was published in this branch; None: nothing is handed out until one is.
        checkpoint: the step that is durable; None if none is.
        acknowledged: batches that were acknowledged and not undone.
        places: how many groups may be under way at once.
        free: how many more may be now.
        under_way: of the groups that are, how many are open, complete, taken, ...
        drawn: items so far.
        streams: by name of the dataset; "" without a mix.
        filtered_in_a_row: groups that were filtered since the last one that was kept.
        failed_in_a_row: rollouts that failed since the last one that did not.
        spent: why the failure budget is spent, and the feed paused; None if it is not.
        errors: the commonest of the newest rollouts: text, how many, the id of one.
        pump: session of the process that draws items; None if none does.
        over: whether all items have come to their ends.
        evaluations: of the store, that have finished so far; those that were dropped do not count.
    """

    name: str
    branch: int
    version: int | None
    checkpoint: int | None
    acknowledged: int
    places: int
    free: int
    under_way: dict[str, int]
    drawn: int
    streams: dict[str, StreamStatus]
    filtered_in_a_row: int
    failed_in_a_row: int
    spent: str | None
    errors: list[tuple[str, int, str]]
    pump: str | None
    over: bool
    evaluations: int = 0


# -- what a user says --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FailureReward:
    """That a rollout whose agent failed counts, with this reward; made by `rs.reward`."""

    value: float

    def __repr__(self) -> str:
        return f"rs.reward({self.value:g})"


def reward(value: float) -> FailureReward:
    """For `on_failure` of a feed: a rollout whose agent failed is trained on, with this reward.

    Raises `InvalidValueError` if it is not a finite number.
    """
    found = number("value", value, "a finite number")
    if math.isinf(found):
        raise InvalidValueError("value", value, "a finite number")
    return FailureReward(found)


@dataclass(frozen=True)
class FailureBudget:
    """How many rollouts of a feed may fail before it pauses and raises `FailureBudgetError`.

    Attributes:
        in_a_row: so many in a row are too many, 1 or more; None: any number may be.
        share: so large a share of the last `window` is too much, above 0 and at most 1; None: any share may be.
        window: rollouts of which the share is taken, 1 or more.

    Raises `InvalidValueError`.
    """

    in_a_row: int | None = 32
    share: float | None = 0.5
    window: int = 200

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "in_a_row", None if self.in_a_row is None else whole("in_a_row", self.in_a_row, at_least=1))
        put(self, "window", whole("window", self.window, at_least=1))
        if self.share is not None:
            put(self, "share", number("share", self.share, "a number above 0 and at most 1, or None"))
            if not 0 < self.share <= 1:
                raise InvalidValueError("share", self.share, "a number above 0 and at most 1, or None")


@dataclass(frozen=True)
class Keep:
    """Which groups are trained on, by the rewards of their valid members; made by `rs.keep`."""

    std: float | None = None
    range: float | None = None
    successes: tuple[int, int] | None = None
    of: str | None = None

    def why_not(self, group: FeedGroup) -> str | None:
        """Why a group is not trained on; None if it is."""
        found = group.rewards if self.of is None else group.rewards_of(self.of)
        rewards = [value for value in found if value is not None]
        whose = "rewards" if self.of is None else f"rewards {self.of!r}"
        if self.std is not None and not (spread := pstdev(rewards) if rewards else 0.0) > self.std:
            return f"standard deviation of {whose} is {spread:.3g}, not above {self.std:g}"
        if self.range is not None and not (width := max(rewards) - min(rewards) if rewards else 0.0) > self.range:
            return f"range of {whose} is {width:.3g}, not above {self.range:g}"
        if self.successes is not None:
            least, most = self.successes
            if not least <= (count := sum(value > 0 for value in rewards)) <= most:
                return f"{count} of {len(rewards)} {whose} are above 0, not {least} to {most}"
        return None

    def __call__(self, group: FeedGroup) -> bool:
        """Whether a group is trained on."""
        return self.why_not(group) is None


def keep(
    *,
    std: float | None = None,
    range: float | None = None,
    successes: tuple[int, int] | None = None,
    of: str | None = None,
) -> Keep:
    """Train on groups only whose rewards differ enough; what does not pass is filtered, and others come in its place.

    Args:
        std: the standard deviation must be larger. `rs.keep(std=1e-6)` is DAPO's dynamic sampling.
        range: the difference of the largest and the least must be larger.
        successes: least and largest number of rewards above 0; `(1, 7)` of 8 leaves out what is always or never solved.
        of: name of the reward (`ctx.reward(value, name=...)`); None: the reward of each rollout.

    At least one of the first three; all that are given must hold. A group passes by the rewards of all its valid
    members. Raises `InvalidValueError`.
    """
    if std is None and range is None and successes is None:
        raise InvalidValueError("std", None, "std, range or successes, to say which groups to keep: rs.keep(std=1e-6)")
    bounds = {name: _bound(name, value) for name, value in (("std", std), ("range", range)) if value is not None}
    if of is not None and not isinstance(of, str):
        raise InvalidValueError("of", of, "the name of a reward, or None")
    return Keep(**bounds, successes=None if successes is None else _numbers(successes), of=of)


def _bound(name: str, value: Any) -> float:
    found = number(name, value, "a number, 0 or more")
    if not 0 <= found < math.inf:
        raise InvalidValueError(name, value, "a number, 0 or more")
    return found


def _numbers(value: Any) -> tuple[int, int]:
    expected = "a pair of whole numbers, the least and the largest: (1, 7)"
    pair = [scalar(one) for one in value] if isinstance(value, (list, tuple)) else []
    if len(pair) != 2 or any(type(one) is not int for one in pair) or not 0 <= pair[0] <= pair[1]:
        raise InvalidValueError("successes", value, expected)
    return pair[0], pair[1]


@runtime_checkable
class Sampler(Protocol):
    """A user's own choice of items, as for a curriculum.

    If it also has `state_dict()` and `load_state_dict(state)`, its state is kept with each draw, and it goes on from
    there after a restart. Its methods run on the feed's thread, one at a time.
    """

    def next(self) -> Any:
        """The next item; None if there is none any more."""

    def observe(self, group_id: str, ending: str, rewards: list[float | None]) -> None:
        """Learn how the group of an item ended: "trained", "filtered", "failed", "stale" or "cancelled"."""
