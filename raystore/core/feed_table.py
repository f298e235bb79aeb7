"""The feeds of a store: what is kept of each, which items are under way, and which groups its next batch is made of.

A feed draws items from a dataset and makes a group of each. It is the consumer of its name, which takes those groups
and no others. An *item* is under way from the draw until its group ended without a training, or its training is
durable; after that it only counts among the endings of its stream. So a feed costs what is under way, however long its
dataset is.
Time is counted in batches: `acks` is how many are acknowledged and not undone. The *lag* of a group is how many came
between its earliest claim and its training.
A version of the policy is a branch and a step: each rewind begins another branch.
Not here: drawing items and the other verbs (`feeds`), what becomes of members (`groups`), batches (`training`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from raystore.core.records import Attempt, Rollout, declare, packed, pairs, shown, unpacked
from raystore.core.selection import Fate, Selection, Value
from raystore.errors import FailureBudgetError, FilteredTooManyError, StoreError

ENDED_KEPT = 1_000  #: endings of items that whoever draws them can still be told

# Why a rollout of a feed is held back, as `Queues.hold` keeps it; no id of resources looks like this.
CLOSED, NO_SLOT = "\0closed\0", "\0slots\0"


class Ending(NamedTuple):
    """How an item ended: number, group, ending, why."""

    number: int
    group_id: str
    ending: str
    why: str | None


class Outcome(NamedTuple):
    """How a member ended, for the failure budget: its error is None if it has not failed."""

    rollout_id: str
    error: str | None


@dataclass(slots=True, eq=False)
class Stream:
    """Items in one order: where a feed stands in a dataset, or in several that it mixes without shares."""

    name: str
    share: float
    length: int | None
    fingerprint: str | None
    epoch: int = declare(0)
    #: Items of this epoch that were drawn.
    cursor: int = declare(0)
    #: The dataset's own state at this position, if it has one.
    state: bytes | None = declare(None)
    #: Nothing more will be drawn.
    is_over: bool = declare(False)
    #: Groups that it is owed in the next batches, or (below 0) has had too many.
    credit: float = declare(0.0)
    #: How many items ended how.
    endings: dict[str, int] = declare(make=dict, pack=pairs, unpack=dict, shows=lambda e: sorted(e.items()))


class Counted(NamedTuple):
    """How the training on an item was counted, to count it out again if it is undone."""

    time: float
    fates: list[Fate]
    values: list[Value]
    is_first: bool  #: nothing was trained on the item before

    def image(self) -> list[Any]:
        """It as plain data."""
        return [self.time, [list(fate) for fate in self.fates], [list(value) for value in self.values], self.is_first]

    @classmethod
    def of(cls, row: list[Any]) -> Counted:
        """It again."""
        time, fates, values, is_first = row
        return cls(time, [Fate(*fate) for fate in fates], [(one, two) for one, two in values], is_first)


@dataclass(slots=True, eq=False)
class Item:
    """One item under way."""

    group_id: str
    #: In the order in which items were drawn.
    number: int
    stream: str
    environment: str
    epoch: int
    index: int
    #: The batches that were acknowledged when the first of its members was claimed, and when its group was complete.
    claimed: int | None = declare(None)
    completed: int | None = declare(None)
    #: Whoever draws items has found that it may be trained on.
    is_kept: bool = declare(False)
    #: In a batch that is not acknowledged.
    is_taken: bool = declare(False)
    #: It was in a batch that was undone: it comes again, first.
    is_returned: bool = declare(False)
    #: It was under way when batches were undone, which come again before it: so it is never too late.
    is_excused: bool = declare(False)
    tokens: int | None = declare(None)
    #: Its lag, in flight and in the queue, once it is trained.
    lag: tuple[int, int] | None = declare(None, unpack=lambda lag: lag if lag is None else tuple(lag))
    #: The group of the same item that came too late.
    requeued_from: str | None = declare(None)
    requeues: int = declare(0)
    #: Of members that have run: calls of models and tokens that these generated, as their runners reported them.
    calls: dict[str, tuple[int, int]] = declare(
        make=dict, pack=pairs, unpack=lambda rows: {one: (turns, tokens) for one, (turns, tokens) in rows},
        in_digest=False,
    )  # fmt: skip
    #: How it was counted as trained on.
    counted: Counted | None = declare(
        None, pack=lambda one: one and one.image(), unpack=lambda row: row and Counted.of(row), in_digest=False
    )


def _by_stream(rows: list[Any]) -> dict[str, Stream]:
    return {row["name"]: unpacked(Stream, row) for row in rows}


def _by_group(rows: list[Any]) -> dict[str, Item]:
    return {row["group_id"]: unpacked(Item, row) for row in rows}


def _all_packed(records: dict[str, Any]) -> list[Any]:
    return [packed(record) for record in records.values()]


def _all_shown(records: dict[str, Any]) -> list[Any]:
    return [shown(record) for record in records.values()]


@dataclass(slots=True, eq=False)
class FeedEntry:
    """All that is known of one feed."""

    name: str
    #: What its user said (`feeds.FeedRule`).
    rule: dict[str, Any]
    streams: dict[str, Stream] = declare(make=dict, pack=_all_packed, unpack=_by_stream, shows=_all_shown)
    #: Items whose groups are open, complete, or taken and not acknowledged.
    items: dict[str, Item] = declare(make=dict, pack=_all_packed, unpack=_by_group, shows=_all_shown)
    #: Items that were trained on in a step that is not durable.
    trained: dict[str, Item] = declare(make=dict, pack=_all_packed, unpack=_by_group, shows=_all_shown)
    #: Items drawn so far.
    drawn: int = declare(0)
    #: Batches that are acknowledged and not undone.
    acks: int = declare(0)
    branch: int = declare(0)
    #: The newest step that was published in this branch; None: none, and nothing is handed out.
    version: int | None = declare(None)
    #: What was published in this branch, by step.
    contents: dict[int, str] = declare(make=dict, pack=pairs, unpack=dict, shows=pairs)
    #: The first version of the resources in each branch.
    branches: list[tuple[int, int]] = declare(make=list, unpack=lambda rows: [tuple(row) for row in rows])
    #: Of each branch but the first, the step at which it begins: later ones of other branches are undone. Older digests
    #: do not have it.
    rewinds: list[tuple[int, int]] = declare(
        make=list, unpack=lambda rows: [tuple(row) for row in rows], in_digest=False
    )
    #: Whose pump draws the items: its session, and its id.
    pump: tuple[str, str] | None = declare(None, unpack=lambda row: row if row is None else tuple(row))
    #: The groups of the next batch, if the user's own function chooses them.
    choice: list[str] = declare(make=list)
    #: Groups that were filtered since the last one that was kept.
    filtered: int = declare(0)
    #: Why the last one was.
    filtered_why: str = declare("")
    #: How the newest members ended.
    outcomes: list[Outcome] = declare(make=list, unpack=lambda rows: [Outcome(*row) for row in rows])
    #: Members that failed since the last one that did not.
    failures: int = declare(0)
    #: Why the failure budget is spent, if it is; until somebody resumes the feed.
    spent: str | None = declare(None)
    #: Rollouts that may run, if their number is limited.
    slots: dict[str, None] = declare(make=dict, pack=list, unpack=dict.fromkeys, shows=list)
    #: Items that ended so far, and the last of them.
    ended: int = declare(0)
    endings: list[Ending] = declare(make=list, unpack=lambda rows: [Ending(*row) for row in rows])
    #: What became of all rollouts and items.
    selection: Selection = declare(make=Selection, pack=Selection.image, unpack=Selection.of, in_digest=False)

    # -- places ------------------------------------------------------------------------------------------------------

    @property
    def is_closed(self) -> bool:
        """Whether it hands out nothing: nothing was published, or too much has failed."""
        return self.version is None or self.spent is not None

    @property
    def places(self) -> int:
        """How many groups may be under way at once."""
        return int((self.rule["max_lag"] + 1) * self.rule["batch"])

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to be given out: nothing will be drawn, and all that is under way is taken."""
        return all(stream.is_over for stream in self.streams.values()) and all(i.is_taken for i in self.items.values())

    def free(self) -> dict[str, int]:
        """How many items may be drawn now, by stream; no streams of which none may."""
        if self.is_closed or any(item.is_returned for item in self.items.values()):
            return {}
        room = self.places - len(self.items)
        live = [stream for stream in self.streams.values() if not stream.is_over]
        if room <= 0 or not live:
            return {}
        if len(self.streams) == 1:
            return {live[0].name: room}
        under_way = dict.fromkeys(self.streams, 0)
        for item in self.items.values():
            under_way[item.stream] += not item.is_taken
        waiting = sum(under_way.values())
        due = self.shares_of(room + waiting, [stream.name for stream in live])
        found: dict[str, int] = {}
        for name, number in due.items():
            if (more := min(number - under_way[name], room)) > 0:
                found[name] = more
                room -= more
        return found

    def shares_of(self, count: int, names: list[str]) -> dict[str, int]:
        """How many of the next `count` groups come from each of these streams."""
        whole = sum(self.streams[name].share for name in names)
        exact = {name: self.streams[name].credit + count * self.streams[name].share / whole for name in names}
        given = {name: max(int(value), 0) for name, value in exact.items()}
        by_rest = sorted(names, key=lambda name: given[name] - exact[name])
        while sum(given.values()) > count:  # credits may say more than there is
            given[max(names, key=lambda name: given[name] - exact[name])] -= 1
        for number in range(count - sum(given.values())):
            given[by_rest[number % len(names)]] += 1
        return given

    # -- lag ---------------------------------------------------------------------------------------------------------

    def lag_of(self, item: Item, before: int) -> tuple[int, int]:
        """The lag of a group that is trained after so many batches: in flight, and in the queue."""
        claimed = before if item.claimed is None else item.claimed
        completed = before if item.completed is None else item.completed
        return max(completed - claimed, 0), max(before - completed, 0)

    def is_late(self, item: Item, before: int) -> bool:
        """Whether a group would be trained too late after so many batches."""
        if item.is_returned or item.is_excused or item.claimed is None:
            return False
        return bool(before - item.claimed > self.rule["max_lag"])

    def branch_of(self, attempt: Attempt | None) -> int:
        """The branch of the policy with which an attempt ran; 0 if it is not known."""
        version = attempt.resources_version if attempt is not None else None
        return 0 if version is None else self.branch_of_version(version)

    def begin_branch(self, at_step: int) -> None:
        """The model is at an earlier step again."""
        if self.version is not None:
            self.branch += 1
            self.rewinds.append((self.branch, at_step))
        elif self.rewinds:  # nothing was published since the last time
            self.rewinds[-1] = self.branch, min(self.rewinds[-1][1], at_step)
        self.version, self.contents = None, {}

    def branch_of_step(self, step: int) -> int:
        """The branch in which a step of the model that stands was made, or is to be made."""
        return next((branch for branch, at_step in reversed(self.rewinds) if step > at_step), 0)

    def branch_of_version(self, version: int) -> int:
        """The branch in which a version of the resources was published."""
        return next((branch for first, branch in reversed(self.branches) if first <= version), 0)

    # -- what the next batch is made of --------------------------------------------------------------------------------

    def next_batch(self, ready: Mapping[str, None], count: int, held: int, *, is_full: bool) -> list[str]:
        """The groups of the next batch, of those that are `ready`; none if it is to wait for others.

        `held` batches are taken and not acknowledged. If the memory of the store `is_full`, nothing is waited for.
        """
        before = self.acks + held
        waiting = self._in_order(ready)
        if self.rule["late"] in ("drop", "requeue"):
            waiting = [item for item in waiting if not self.is_late(item, before)]
        if self.rule["order"] == "chosen":
            returned = [item.group_id for item in waiting if item.is_returned and item.group_id in ready]
            return (returned or [group_id for group_id in self.choice if group_id in ready])[:count]
        blocked: set[str] = set()  # streams of which an item before is not there yet, where order counts
        there: list[Item] = []
        for item in waiting:
            if item.group_id not in ready:
                if self.rule["order"] == "in_order":
                    blocked.add(item.stream)
            elif item.stream not in blocked or item.is_returned:
                there.append(item)
        found = self._mixed(there, waiting, count)
        is_over = all(stream.is_over for stream in self.streams.values()) and len(there) == len(waiting)
        come_again = any(item.is_returned for item in found)  # these wait for nobody
        is_whole = len(found) >= count or is_over
        may_swap = self.rule["order"] != "in_order"  # else none is late that was not drawn too late
        if self.rule["late"] == "wait" and may_swap and is_whole and not come_again and not is_full:
            in_time = self._in_time(found, there, waiting, count, before)
            if in_time is None:
                return []
            found = in_time
        return self._packed(found, is_whole=is_whole or come_again or is_full)

    def _in_order(self, ready: Mapping[str, None]) -> list[Item]:
        """Items that are in no batch, as they are to be trained on: first those that come again, as they came."""
        places = {group_id: place for place, group_id in enumerate(ready)}
        last = len(places)
        is_by_time = self.rule["order"] == "ready_first"

        def key(item: Item) -> tuple[bool, int, int]:
            place = places.get(item.group_id, last) if item.is_returned or is_by_time else 0
            return not item.is_returned, place, item.number

        return sorted((item for item in self.items.values() if not item.is_taken), key=key)

    def _in_time(
        self, found: list[Item], there: list[Item], waiting: list[Item], count: int, before: int
    ) -> list[Item] | None:
        """A batch, changed as little as may be so that no group is late; None if it must have one that is not there.

        Of the groups that are due in the next `n` batches, it must have all that the other n - 1 have no room for.
        """
        chosen = {item.group_id for item in found}
        for later in range(self.rule["max_lag"] + 1):
            due = [item for item in waiting if self.is_late(item, before + later + 1)]
            lacking = len(due) - later * count - sum(item.group_id in chosen for item in due)
            if lacking <= 0:
                continue
            due_ids = {item.group_id for item in due}
            more = [item for item in there if item.group_id in due_ids - chosen][:lacking]
            if len(more) < lacking:
                return None
            others = [item for item in found if item.group_id not in due_ids]
            for item in more:
                if len(chosen) >= count:
                    if not others:
                        break
                    same = [other for other in others if other.stream == item.stream]  # so that shares hold
                    gone = (same or others)[-1]
                    others.remove(gone)
                    chosen.remove(gone.group_id)
                chosen.add(item.group_id)
            found = [item for item in there if item.group_id in chosen]
        return found

    def _mixed(self, there: list[Item], waiting: list[Item], count: int) -> list[Item]:
        """Up to `count` of the items that are there, with each stream's share; those that come again in any case."""
        if len(self.streams) == 1:
            return there[:count]
        found = [item for item in there if item.is_returned][:count]
        left = self._shares_of_batch(waiting, count - len(found))
        for item in there:
            if not item.is_returned and left.get(item.stream, 0) > 0:
                left[item.stream] -= 1
                found.append(item)
        return [item for item in there if item in found]

    def _shares_of_batch(self, waiting: list[Item], count: int) -> dict[str, int]:
        """How many groups of each stream the next batch has; a stream that is over gives what it still has."""
        there = dict.fromkeys(self.streams, 0)
        for item in waiting:
            there[item.stream] += not item.is_returned
        shares: dict[str, int] = {}
        names = [name for name, stream in self.streams.items() if not stream.is_over or there[name]]
        while names and count > 0:
            asked = self.shares_of(count, names)
            short = [name for name in names if self.streams[name].is_over and there[name] < asked[name]]
            if not short:
                return shares | asked
            for name in short:
                shares[name] = there[name]
                count -= there[name]
                names.remove(name)
        return shares

    def _packed(self, items: list[Item], *, is_whole: bool) -> list[str]:
        """As many of these as a batch has tokens for; none if it is not whole, and has tokens for more."""
        bound = self.rule["batch_tokens"]
        if bound is not None:
            total = 0
            for number, item in enumerate(items):
                total += item.tokens or 0
                if total > bound:
                    return [item.group_id for item in items[: max(number, 1)]]
        return [item.group_id for item in items] if is_whole else []

    # -- what becomes of items -----------------------------------------------------------------------------------------

    def count(self, stream: str, ending: str, more: int = 1) -> None:
        """Count the ending of an item of a stream; or, with -1, that it has not ended after all."""
        endings = self.streams[stream].endings
        endings[ending] = endings.get(ending, 0) + more
        if not endings[ending]:
            del endings[ending]

    def tell(self, group_id: str, ending: str, why: str | None) -> None:
        """Note how an item ended, for whoever draws them."""
        self.ended += 1
        self.endings.append(Ending(self.ended, group_id, ending, why))
        del self.endings[:-ENDED_KEPT]

    def note_outcome(self, rollout_id: str, error: str | None) -> None:
        """Note how a member ended, for the failure budget."""
        self.outcomes.append(Outcome(rollout_id, error))
        del self.outcomes[: -self.rule["window"]]
        self.failures = self.failures + 1 if error is not None else 0
        in_a_row, share = self.rule["in_a_row"], self.rule["share"]
        if self.spent is not None:
            return
        failed = sum(outcome.error is not None for outcome in self.outcomes)
        if in_a_row is not None and self.failures >= in_a_row:
            self.spent = f"{self.failures} rollouts failed in a row"
        elif share is not None and len(self.outcomes) >= self.rule["window"] and failed >= share * len(self.outcomes):
            self.spent = f"{failed} of the last {len(self.outcomes)} rollouts failed"

    def refusal(self) -> StoreError | None:
        """Why it gives no batch until somebody resumes it, if so."""
        bound = self.rule["max_filtered"]
        if self.spent is not None:
            return FailureBudgetError(self.name, self.spent, [list(row) for row in self.commonest_errors()])
        if bound is not None and self.filtered > bound:
            return FilteredTooManyError(self.name, self.filtered, bound, self.filtered_why)
        return None

    def commonest_errors(self) -> list[tuple[str, int, str]]:
        """The commonest errors of members: how many there were of each, and the newest rollout that had it."""
        found: dict[str, tuple[int, str]] = {}
        for rollout_id, error in self.outcomes:
            if error is not None:
                found[error] = (found.get(error, (0, ""))[0] + 1, rollout_id)
        return sorted(((error, *seen) for error, seen in found.items()), key=lambda row: -row[1])[:5]


class FeedTable:
    """All feeds of a store."""

    def __init__(self) -> None:
        self.by_name: dict[str, FeedEntry] = {}
        self.by_group: dict[str, FeedEntry] = {}  #: of items under way
        self.moved: dict[str, None] = {}  #: `State.moved_feeds`
        self.uncounted: list[tuple[FeedEntry, Item, str]] = []  #: items that have ended in this step, and how

    def __len__(self) -> int:
        return len(self.by_name)

    def __iter__(self) -> Iterator[FeedEntry]:
        return iter(self.by_name.values())

    def get(self, name: str) -> FeedEntry | None:
        """The feed of this name, if there is one."""
        return self.by_name.get(name)

    def item_of(self, group_id: str | None) -> Item | None:
        """The item of a group that is under way, and not trained."""
        feed = self.by_group.get(group_id or "")
        return feed.items.get(group_id or "") if feed is not None else None

    def hindrance(self, rollout: Rollout) -> str | None:
        """Why a rollout that is to wait in its queue is held back, if so; else it has a slot from now on."""
        feed = self.by_group.get(rollout.group_id or "")
        if feed is None:
            return None
        if feed.is_closed:
            return CLOSED
        limit = feed.rule["max_running"]
        if limit is not None and rollout.rollout_id not in feed.slots:
            if len(feed.slots) >= limit:
                return NO_SLOT
            feed.slots[rollout.rollout_id] = None
        return None

    def add(self, feed: FeedEntry, item: Item) -> None:
        """An item is under way from now on."""
        feed.items[item.group_id] = item
        self.by_group[item.group_id] = feed

    def end(self, feed: FeedEntry, item: Item, ending: str, why: str | None) -> None:
        """An item has ended without a training."""
        del feed.items[item.group_id], self.by_group[item.group_id]
        feed.count(item.stream, ending)
        feed.tell(item.group_id, ending, why)
        self.uncounted.append((feed, item, ending))
        self.moved[feed.name] = None

    def let_go(self, session_id: str) -> None:
        """Nobody draws the items of the feeds of a session that has ended; its id may come to another process."""
        for feed in self:
            if feed.pump is not None and feed.pump[0] == session_id:
                feed.pump = None

    def remove(self, name: str) -> None:
        """Forget a feed; its groups are as any others from now on."""
        feed = self.by_name.pop(name, None)
        if feed is not None:
            for group_id in (*feed.items, *feed.trained):
                del self.by_group[group_id]

    # -- batches of a feed ---------------------------------------------------------------------------------------------

    def take(self, feed: FeedEntry, group_ids: Iterable[str]) -> None:
        """These groups are in a batch now."""
        fresh: dict[str, int] = {}
        for group_id in group_ids:
            item = feed.items[group_id]
            item.is_taken = True
            if not item.is_returned:
                fresh[item.stream] = fresh.get(item.stream, 0) + 1
        feed.choice = []
        self._charge(feed, fresh)
        self.moved[feed.name] = None

    def _charge(self, feed: FeedEntry, fresh: dict[str, int]) -> None:
        """Let streams that gave less than their share to a batch give more to the next ones."""
        if len(feed.streams) == 1 or not fresh:
            return
        live = {item.stream for item in feed.items.values()}
        names = [name for name, stream in feed.streams.items() if not stream.is_over or name in live]
        whole = sum(feed.streams[name].share for name in names)
        total = sum(fresh.values())
        for name in names:
            stream = feed.streams[name]
            stream.credit += total * stream.share / whole - fresh.get(name, 0)

    def train(self, feed: FeedEntry, group_ids: Iterable[str]) -> None:
        """A batch of these groups was acknowledged."""
        for group_id in group_ids:
            item = feed.items.pop(group_id, None)
            if item is not None:  # else its last member was deleted meanwhile
                item.lag = feed.lag_of(item, feed.acks)
                item.is_taken, item.is_returned = False, False
                feed.trained[group_id] = item
                feed.count(item.stream, "trained")
                feed.tell(group_id, "trained", None)
                self.uncounted.append((feed, item, "trained"))
        feed.acks += 1
        self.moved[feed.name] = None

    def give_back(self, feed: FeedEntry, group_ids: Iterable[str], acknowledged: int) -> None:
        """Batches with these groups were undone, of which some were `acknowledged`."""
        feed.acks -= acknowledged
        for group_id in group_ids:
            item = feed.items.get(group_id)
            if item is None and (item := feed.trained.pop(group_id, None)) is not None:
                item.lag = None
                feed.items[group_id] = item
                feed.count(item.stream, "trained", -1)
                if (counted := item.counted) is not None:
                    place = (item.environment, item.index)
                    feed.selection.undo(counted.time, counted.fates, counted.values, place, counted.is_first)
                    item.counted = None
            if item is not None:
                item.is_taken, item.is_returned = False, True
        if acknowledged:  # whatever was claimed in the meantime was claimed after the last batch that counts
            for item in feed.items.values():
                item.is_excused = True
                item.claimed = None if item.claimed is None else min(item.claimed, feed.acks)
                item.completed = None if item.completed is None else min(item.completed, feed.acks)
        self.moved[feed.name] = None

    def release(self, feed: FeedEntry, group_ids: Iterable[str]) -> None:
        """The training on these groups is durable."""
        for group_id in group_ids:
            if feed.trained.pop(group_id, None) is not None:
                del self.by_group[group_id]

    # -- as a whole ----------------------------------------------------------------------------------------------------

    def image(self) -> list[Any]:
        """All of it, as plain data."""
        return [packed(feed) for feed in self]

    def restore(self, image: list[Any]) -> None:
        """Fill an empty table from an image."""
        for row in image:
            feed = unpacked(FeedEntry, row)
            self.by_name[feed.name] = feed
            self.by_group.update(dict.fromkeys((*feed.items, *feed.trained), feed))

    def sums(self) -> list[Any]:
        """How much there is of each feed, for a quick comparison."""
        return [
            (
                feed.name,
                len(feed.items),
                len(feed.trained),
                feed.drawn,
                feed.acks,
                feed.branch,
                feed.version,
                feed.ended,
            )
            for feed in self
        ]

    def shown(self) -> list[Any]:
        """What a replay must reproduce."""
        return [shown(self.by_name[name]) for name in sorted(self.by_name)]
