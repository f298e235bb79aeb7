"""The groups of a store: what is kept of each, and how they are found.

A group is made of *places*, `n` of them, each held by one of its members. Members without a place are spares, or have
lost theirs to another one. A group keeps of each member how it *stands*, so that nobody need look at its rollouts.
Not here: what becomes of a member and of its group (`groups`), who trains on it (`training`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from raystore.core.lifecycle import OPEN, READY
from raystore.core.records import Rollout, declare, packed, pairs, unpacked

# How a member stands.
LIVE, SUCCEEDED, FAILED, CANCELLED = "live", "succeeded", "failed", "cancelled"
# The same of a member of a feed that failed by what its agent did, and keeps its place: it is trained on with the
# reward that the feed has for failures, or is left out.
SCORED, MASKED = "scored", "masked"
FILLING = frozenset({SUCCEEDED, SCORED, MASKED})  #: stands of members whose places need nobody else
TRAINED_ON = frozenset({SUCCEEDED, SCORED})

GROUP_BYTES = 1_100  #: that a group counts for, beside its members and tags
MEMBER_BYTES = 65  #: and each of its members

IN_A_SECTION = 1_000  #: groups in one section of a snapshot


@dataclass(slots=True, eq=False)
class GroupEntry:
    """All that is known of one group."""

    group_id: str
    #: In the order in which groups came.
    number: int
    n: int
    #: With so many successes it is complete, when more cannot be had; None: only with all `n`.
    min_size: int | None
    spare: int
    #: How many members may be replaced that failed by what their agents did.
    replace: int
    start_time: float
    #: On the clock that stands still in pauses.
    deadline: float | None
    mode: str | None
    queue: str
    priority: int
    tags: dict[str, Any]
    #: The arguments of a caller-given id, to tell a repetition from a conflict.
    given: tuple[Any, ...] | None = declare(None, unpack=lambda row: row if row is None else tuple(row))
    status: str = declare(OPEN)
    why: str | None = declare(None)
    end_time: float | None = declare(None)
    #: How each member stands, in the order in which they came.
    members: dict[str, str] = declare(make=dict, pack=pairs, unpack=dict, shows=pairs)
    #: The members that hold a place, and the number of the place.
    places: dict[str, int] = declare(make=dict, pack=pairs, unpack=dict)
    #: Members without a place that may still get one, in the order in which they came.
    spares: dict[str, None] = declare(make=dict, pack=list, unpack=dict.fromkeys, shows=list)
    #: What is trained on, in the order of places; empty until it is complete.
    chosen: dict[str, None] = declare(make=dict, pack=list, unpack=dict.fromkeys, shows=list)
    #: Places that need somebody yet.
    missing: int = declare(0)
    #: How many members were replaced that failed by what their agents did,
    replaced: int = declare(0)
    #: and how many that failed by the infrastructure.
    renewed: int = declare(0)
    #: In the order in which groups became complete.
    completion: int = declare(0)
    #: Members that are held back, since their resources cannot be had.
    held: dict[str, None] = declare(make=dict, pack=list, unpack=dict.fromkeys, shows=list)
    #: Since when its deadline rests, because of them.
    rests_since: float | None = declare(None)

    @property
    def has_rule(self) -> bool:
        """Whether its caller has said what is to become of members that fail or are late."""
        return self.min_size is not None or self.deadline is not None or self.spare > 0 or self.replace > 0

    @property
    def least(self) -> int:
        """With fewer successes it is not trained on."""
        return self.n if self.min_size is None else self.min_size

    @property
    def is_open(self) -> bool:
        """Whether more members may still succeed for it."""
        return self.status == OPEN

    @property
    def is_ready(self) -> bool:
        """Whether a consumer may be given it."""
        return self.status in READY and len(self.chosen) >= self.least

    @property
    def in_place(self) -> list[str]:
        """The members that hold a place, in the order of places."""
        return sorted(self.places, key=self.places.__getitem__)

    def with_stand(self, *stands: str) -> list[str]:
        """The members that stand so."""
        return [rollout_id for rollout_id, stand in self.members.items() if stand in stands]


class GroupTable:
    """All groups of a store."""

    def __init__(self) -> None:
        self.by_id: dict[str, GroupEntry] = {}
        self._by_status: dict[str, dict[str, None]] = {}
        self.made: int = 0
        self.completions: int = 0  #: groups that became complete so far
        self.bytes: int = 0  #: that all of it counts for
        self.touched: dict[str, None] = {}  #: with a journal: groups that have changed since they were verified last

    def __len__(self) -> int:
        return len(self.by_id)

    def __iter__(self) -> Iterator[GroupEntry]:
        return iter(self.by_id.values())

    def get(self, group_id: str | None) -> GroupEntry | None:
        """The group of this id, if there is one."""
        return self.by_id.get(group_id) if group_id is not None else None

    def of(self, rollout: Rollout) -> GroupEntry | None:
        """The group that a rollout is a member of; none if it only carries the id of one."""
        if rollout.group_id is None:
            return None
        group = self.by_id.get(rollout.group_id)
        return group if group is not None and rollout.rollout_id in group.members else None

    def having(self, status: str) -> dict[str, None]:
        """The ids of the groups with a status, by when they came to it."""
        return self._by_status.get(status, {})

    def count(self, status: str) -> int:
        """How many groups have a status."""
        return len(self.having(status))

    def counts(self) -> dict[str, int]:
        """How many groups have each status that any has."""
        return {status: len(ids) for status, ids in self._by_status.items() if ids}

    def add(self, group: GroupEntry) -> None:
        """Enter a new group."""
        self.by_id[group.group_id] = group
        self._by_status.setdefault(group.status, {})[group.group_id] = None
        self.bytes += size_of_group(group)

    def remove(self, group: GroupEntry) -> None:
        """Forget a group."""
        del self.by_id[group.group_id]
        del self._by_status[group.status][group.group_id]
        self.bytes -= size_of_group(group)

    def move(self, group: GroupEntry, status: str) -> None:
        """Give a group another status."""
        del self._by_status[group.status][group.group_id]
        group.status = status
        self._by_status.setdefault(status, {})[group.group_id] = None

    def join(self, group: GroupEntry, rollout_id: str, place: int | None = None) -> None:
        """A rollout is a new member, with a place or as a spare."""
        group.members[rollout_id] = LIVE
        self.bytes += MEMBER_BYTES
        if place is None:
            group.spares[rollout_id] = None
        else:
            group.places[rollout_id] = place

    def leave(self, group: GroupEntry, rollout_id: str) -> None:
        """A member is deleted. Its place, if it held one, stays empty."""
        del group.members[rollout_id]
        self.bytes -= MEMBER_BYTES
        for kept in (group.places, group.spares, group.chosen, group.held):
            kept.pop(rollout_id, None)

    # -- snapshots -----------------------------------------------------------------------------------------------------

    def image(self) -> Iterator[Any]:
        """All of it as plain values, some groups at a time; nothing if there never was a group."""
        rows: list[Any] = []
        for group in self:
            rows.append(packed(group))
            if len(rows) == IN_A_SECTION:
                yield [self.made, self.completions, [], rows]
                rows = []
        if rows or self.made:
            yield [self.made, self.completions, list(self.touched), rows]

    def restore(self, image: list[Any]) -> None:
        """Take over what was in a section of a snapshot."""
        self.made, self.completions, touched, rows = image
        self.touched.update(dict.fromkeys(touched))
        for row in rows:
            self.add(unpacked(GroupEntry, row))

    def check(self) -> None:
        """Verify that indexes and sums are those of the groups."""
        found = {group_id: status for status, ids in self._by_status.items() for group_id in ids}
        assert found == {group.group_id: group.status for group in self}, "groups by status"
        assert sum(map(len, self._by_status.values())) == len(self), "a group has two statuses"
        assert self.bytes == sum(map(size_of_group, self)), "bytes of groups"


def size_of_group(group: GroupEntry) -> int:
    """Bytes that a group counts for."""
    return GROUP_BYTES + MEMBER_BYTES * len(group.members)


def in_order_of_completion(groups: Iterable[GroupEntry]) -> list[GroupEntry]:
    """Groups by when they became complete."""
    return sorted(groups, key=lambda group: group.completion)
