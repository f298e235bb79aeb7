"""The evaluations of a store: what is kept of each, which rollouts are theirs, and what their samples came to.

An evaluation is known by its name, a version of the policy and the branch of that version. Each of its items is a group
of `samples` rollouts. As long as it runs, it keeps of each item what its samples came to, so that rollouts may be
deleted; once it has ended it keeps its scores only. Its rollouts are marked for as long as they exist: no consumer is
ever given one, and each waits in a line of its own (`queues.EVALUATED`).
Not here: verbs, and what follows from each step (`evaluations`), statistics (`scores`), claims (`claims`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import fsum, isfinite
from typing import Any

from raystore.core.group_table import GroupTable
from raystore.core.indexes import CompletionLog
from raystore.core.lifecycle import ACTIVE, FINISHED
from raystore.core.queues import Queues
from raystore.core.records import Attempt, Rollout, declare, packed, shown, unpacked
from raystore.core.scores import Sampled, score

RUNNING, ENDED, DROPPED = "running", "finished", "dropped"  #: where an evaluation stands
#: Why a rollout is held back: its pinned version cannot be had. No id of resources looks like this.
LOST = "\0version\0"

KEPT = 1_000  #: evaluations of one name that have ended: of these the newest stay,
KEPT_IN_ALL = 10_000  #: and so many of all names

Row = list[Any]


@dataclass(slots=True, eq=False)
class EvaluatedItem:
    """What the samples of one item came to."""

    group_id: str
    environment: str
    index: int
    #: By rollout that has finished: its reward, None if it failed or has no reward.
    results: dict[str, float | None] = declare(make=dict, pack=lambda r: list(r.items()), unpack=dict,
                                               shows=lambda r: sorted(r.items()))  # fmt: skip


def _items_packed(items: dict[str, EvaluatedItem]) -> list[Any]:
    return [packed(item) for item in items.values()]


def _items_unpacked(rows: list[Any]) -> dict[str, EvaluatedItem]:
    return {row["group_id"]: unpacked(EvaluatedItem, row) for row in rows}


def _items_shown(items: dict[str, EvaluatedItem]) -> list[Any]:
    return [shown(item) for item in items.values()]


@dataclass(slots=True, eq=False)
class Evaluation:
    """All that is known of one evaluation."""

    name: str
    #: Of the policy: the one that is pinned, else the newest one when it began. None if none was published.
    version: int | None
    branch: int
    #: What its user said (`evaluations.EvaluationRule`).
    rule: dict[str, Any]
    start_time: float
    #: In the order in which evaluations began.
    number: int
    #: The feed to whose branches the version belongs.
    feed: str | None = declare(None)
    resources_id: str | None = declare(None)
    #: The version of the resources with which all its attempts run, if it is pinned and has not ended.
    pin: int | None = declare(None)
    #: Why that version cannot be had at present, if so.
    lost: str | None = declare(None)
    status: str = declare(RUNNING)
    why: str | None = declare(None)
    end_time: float | None = declare(None)
    #: Items whose groups were made.
    position: int = declare(0)
    #: As long as it runs.
    items: dict[str, EvaluatedItem] = declare(make=dict, pack=_items_packed, unpack=_items_unpacked, shows=_items_shown)
    #: Samples that have finished.
    counted: int = declare(0)
    #: The least and the greatest version of the policy that samples ran with.
    versions: tuple[int, int] | None = declare(None, unpack=lambda row: row if row is None else tuple(row))
    #: Once it has ended: the score of all items, and by environment.
    scores: list[Any] = declare(make=list)

    @property
    def key(self) -> str:
        """By which it is known; ids of its groups begin with it."""
        return key_of(self.name, self.version, self.branch)

    @property
    def is_whole(self) -> bool:
        """Whether each sample of each item has finished."""
        total = int(self.rule["total"])
        return self.position == total and self.counted == total * int(self.rule["samples"])

    def note(self, item: EvaluatedItem, rollout_id: str, rollout: Rollout | None, attempt: Attempt | None) -> None:
        """Note how a sample stands; None: it was deleted, after which what it came to stays."""
        before = len(item.results)
        if rollout is None:
            item.results.setdefault(rollout_id, None)
        elif rollout.status in FINISHED:
            reward = rollout.reward if rollout.status == "succeeded" else None
            item.results[rollout_id] = reward if reward is not None and isfinite(reward) else None
            policy = attempt.policy_version if attempt is not None else None
            if policy is not None:
                least, most = self.versions or (policy, policy)
                self.versions = min(least, policy), max(most, policy)
        else:
            item.results.pop(rollout_id, None)
        self.counted += len(item.results) - before

    def scored(self) -> list[Any]:
        """The score of all items so far, and those by environment."""
        if self.status != RUNNING:
            return self.scores
        threshold, failure = self.rule["threshold"], self.rule["failure_reward"]
        by_environment: dict[str, list[Sampled]] = {}
        for item in self.items.values():
            found = item.results.values()
            rewards = [failure if reward is None else reward for reward in found]
            passed = sum(reward is not None and reward > threshold for reward in found)
            failed = sum(reward is None for reward in found)
            sampled = Sampled(len(rewards), passed, failed, fsum(rewards))
            by_environment.setdefault(item.environment, []).append(sampled)
        everything = [one for items in by_environment.values() for one in items]
        samples = self.rule["samples"]
        return [
            _row(everything, samples),
            [[environment, _row(items, samples)] for environment, items in sorted(by_environment.items())],
        ]


def _row(items: list[Sampled], samples: int) -> Row:
    """A score as plain data."""
    found = score(items, samples)
    chances = [[k, list(chance)] for k, chance in found.pass_at.items()]
    mean = None if found.mean is None else list(found.mean)
    return [found.items, found.samples, found.passed, found.failed, mean, chances]


def key_of(name: str, version: int | None, branch: int) -> str:
    """By which an evaluation is known."""
    return f"{name}@{'-' if version is None else version}{f'.{branch}' if branch else ''}"


class EvaluationTable:
    """All evaluations of a store, and their rollouts."""

    def __init__(self) -> None:
        self.by_key: dict[str, Evaluation] = {}
        self.made: int = 0
        self.finished: int = 0  #: that have ended with all their samples
        self.running: dict[str, Evaluation] = {}  #: those that have not ended
        self.by_group: dict[str, str] = {}  #: key of the evaluation of each group, also of one that is not kept
        self.by_rollout: dict[str, str] = {}  #: the same of each rollout
        self.strays: dict[str, None] = {}  #: those of `by_rollout` that are in no group: made by a requeue
        self.unfinished: dict[str, None] = {}  #: those that wait or run,
        self.active: dict[str, None] = {}  #: and those that run
        self.moved: dict[str, None] = {}  #: evaluations whose samples have changed in this step

    def __len__(self) -> int:
        return len(self.by_key)

    def __iter__(self) -> Iterator[Evaluation]:
        return iter(self.by_key.values())

    @property
    def are_used(self) -> bool:
        """Whether there is, or was, any."""
        return self.made > 0

    def of_rollout(self, rollout_id: str) -> Evaluation | None:
        """The evaluation of a rollout, as long as it runs."""
        return self.running.get(self.by_rollout.get(rollout_id, ""))

    def pin_of(self, rollout: Rollout) -> int | None:
        """The version of its resources with which a rollout is to run, if that is fixed."""
        found = self.of_rollout(rollout.rollout_id)
        return None if found is None or found.resources_id != rollout.resources_id else found.pin

    def pins(self) -> list[tuple[str, int]]:
        """The versions of resources that are kept for evaluations."""
        return [(one.resources_id, one.pin) for one in self.running.values() if one.resources_id and one.pin]

    # -- with every change of a rollout --------------------------------------------------------------------------------

    def join(self, rollout_id: str, key: str, status: str) -> None:
        """A rollout that is made belongs to an evaluation."""
        self.by_rollout[rollout_id] = key
        self.move(rollout_id, status)

    def move(self, rollout_id: str, status: str) -> None:
        """A rollout of an evaluation comes to a status."""
        if status in FINISHED:
            self.unfinished.pop(rollout_id, None)
        else:
            self.unfinished[rollout_id] = None
        if status in ACTIVE:
            self.active[rollout_id] = None
        else:
            self.active.pop(rollout_id, None)

    def forget(self, rollout_id: str) -> None:
        """A rollout is deleted."""
        for known in (self.by_rollout, self.strays, self.unfinished, self.active):
            known.pop(rollout_id, None)

    def note(self, group_id: str, rollout_id: str, rollout: Rollout | None, attempt: Attempt | None) -> None:
        """A member of the group of an item has changed."""
        found = self.running.get(self.by_group.get(group_id, ""))
        item = found.items.get(group_id) if found is not None else None
        if found is not None and item is not None:
            found.note(item, rollout_id, rollout, attempt)
            self.moved[found.key] = None

    # -- coming and going ----------------------------------------------------------------------------------------------

    def add(self, evaluation: Evaluation) -> None:
        """Enter an evaluation."""
        self.by_key[evaluation.key] = evaluation
        if evaluation.status == RUNNING:
            self.running[evaluation.key] = evaluation

    def end(self, evaluation: Evaluation) -> None:
        """An evaluation has ended; the oldest of those that have go, if there are more than are kept."""
        self.running.pop(evaluation.key, None)
        self.finished += evaluation.status == ENDED
        ended = [one for one in self if one.status != RUNNING]
        of_name = [one for one in ended if one.name == evaluation.name]
        gone = [*ended[: max(len(ended) - KEPT_IN_ALL, 0)], *of_name[: max(len(of_name) - KEPT, 0)]]
        for one in gone:
            self.by_key.pop(one.key, None)

    def of(self, name: str | None, feed: str | None = None) -> list[Evaluation]:
        """Those of a name, or of a feed, by version and branch."""
        found = [one for one in self if name in (None, one.name) and feed in (None, one.feed)]
        found.sort(key=lambda one: (one.name, -1 if one.version is None else one.version, one.branch))
        return found

    # -- as a whole ----------------------------------------------------------------------------------------------------

    def image(self) -> list[Any]:
        """All of it, as plain data."""
        groups: dict[str, list[str]] = {}
        for group_id, key in self.by_group.items():
            groups.setdefault(key, []).append(group_id)
        strays = [(rollout_id, self.by_rollout[rollout_id]) for rollout_id in self.strays]
        return [self.made, self.finished, [packed(one) for one in self], list(groups.items()), strays]

    def restore(self, image: list[Any]) -> None:
        """Fill an empty table from an image; `gather` finds what follows from the other tables."""
        self.made, self.finished, rows, groups, strays = image
        for row in rows:
            self.add(unpacked(Evaluation, row))
        for key, group_ids in groups:
            self.by_group.update(dict.fromkeys(group_ids, key))
        self.by_rollout.update(strays)
        self.strays.update(dict.fromkeys(rollout_id for rollout_id, _ in strays))

    def gather(self, groups: GroupTable, finished: CompletionLog, active: Iterable[str]) -> None:
        """Find the rollouts, and where they stand, after the table was filled."""
        for group_id, key in self.by_group.items():
            self.by_rollout.update(dict.fromkeys(groups.by_id[group_id].members, key))
        self.unfinished.update(dict.fromkeys(i for i in self.by_rollout if i not in finished))
        self.active.update(dict.fromkeys(i for i in active if i in self.by_rollout))

    def sums(self) -> list[Any]:
        """How much there is, for a quick comparison."""
        rows = [(one.key, one.status, one.position, one.counted, one.pin) for one in self.running.values()]
        return [self.made, self.finished, len(self), len(self.by_rollout), rows]

    def shown(self) -> list[Any]:
        """What a replay must reproduce."""
        evaluations = [shown(self.by_key[key]) for key in sorted(self.by_key)]
        return [self.made, self.finished, evaluations, sorted(self.by_group.items()), sorted(self.by_rollout.items())]

    def check(self, rollouts: Mapping[str, str], queues: Queues) -> None:
        """Verify what is known of rollouts, given the status of each."""
        mine = {i: rollouts[i] for i in self.by_rollout}  # one that is deleted is forgotten
        assert self.unfinished.keys() == {i for i, status in mine.items() if status not in FINISHED}, "unfinished"
        assert self.active.keys() == {i for i, status in mine.items() if status in ACTIVE}, "what runs of evaluations"
        assert self.running == {key: one for key, one in self.by_key.items() if one.status == RUNNING}, "what runs"
        assert not self.moved, "an evaluation has not followed its samples"
        for rollout_id in queues:
            assert not queues.is_evaluated(rollout_id) or rollout_id in mine, f"{rollout_id} waits in the wrong line"
        for key, one in self.by_key.items():
            assert key == one.key, f"evaluation {key}"
            if one.status != RUNNING:
                assert one.pin is None and not one.items and one.scores, f"evaluation {key} has ended"
                continue
            assert not one.is_whole, f"evaluation {key} should end"
            assert len(one.items) == one.position, f"items of {key}"
            assert one.counted == sum(len(item.results) for item in one.items.values()), f"samples of {key}"
