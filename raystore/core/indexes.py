"""What is kept with every change so that no question needs a scan.

`Indexes` map a value (a status, group, tag, queue, worker or predecessor) to the ids of rollouts. The feed of changes
and the log of completions are read with a cursor, a sequence number: "give me what follows this one". Sequence numbers
only grow, so a reader that comes back resumes exactly. The feed is bounded and says so (`CursorTooOldError`); the
completion log has one entry for each finished rollout and keeps it as long as the rollout. `WatchSets` names the
rollouts that one caller reads the log for.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator
from itertools import islice, takewhile
from typing import Any

from raystore.core.records import Attempt, Change, Rollout
from raystore.errors import AnswerGoneError, CursorTooOldError

Key = tuple[str, Any]  #: of an index: what kind of value, and the value

PACKED = 20_000  #: an index that is longer is made at the start, since that would hold up whoever asks


def keys_of(rollout: Rollout, attempt: Attempt | None) -> Iterator[Key]:
    """The index keys under which a rollout can be found."""
    yield "status", rollout.status
    yield "queue", rollout.queue
    if rollout.group_id is not None:
        yield "group", rollout.group_id
    if rollout.requeued_from is not None:
        yield "requeued_from", rollout.requeued_from
    for name, value in rollout.tags.items():
        yield "tag", (name, value)
    if attempt is not None and attempt.worker_id is not None:
        yield "worker", attempt.worker_id


class Indexes:
    """Rollout ids by index key."""

    def __init__(self) -> None:
        self._ids: dict[Key, dict[str, None]] = {}
        self._packed: dict[Key, tuple[array[int], list[str]]] = {}  # as they stood in an image, until somebody asks

    def find(self, key: Key) -> dict[str, None]:
        """The rollouts under one key."""
        if key in self._packed:
            self._unpack(key)
        return self._ids.get(key, {})

    def _unpack(self, key: Key) -> None:
        numbers, ids = self._packed.pop(key)
        self._ids[key] = dict.fromkeys(map(ids.__getitem__, numbers))

    def image(self, numbers: dict[str, int]) -> list[Any]:
        """The keys, and the numbers of the rollouts under each."""
        self._unpack_all()
        return [(key, array("I", map(numbers.__getitem__, ids)).tobytes()) for key, ids in self._ids.items()]

    def _unpack_all(self) -> None:
        for key in list(self._packed):
            self._unpack(key)

    def restore(self, image: list[Any], ids: list[str]) -> None:
        """Fill empty indexes from an image."""
        for (name, value), numbers in image:
            key = (name, tuple(value) if isinstance(value, list) else value)
            self._packed[key] = (array("I", numbers), ids)
            if len(self._packed[key][0]) > PACKED:
                self._unpack(key)

    def move(self, rollout_id: str, kind: str, before: Any, after: Any) -> None:
        """Find a rollout under another value of one kind from now on; None: under no value."""
        if before is not None:
            key = (kind, before)
            if key in self._packed:
                self._unpack(key)
            ids = self._ids[key]
            del ids[rollout_id]
            if not ids:
                del self._ids[key]
        if after is not None:
            key = (kind, after)
            if key in self._packed:
                self._unpack(key)
            if key not in self._ids:
                self._ids[key] = {}
            self._ids[key][rollout_id] = None

    def count(self, key: Key) -> int:
        """How many rollouts there are under one key."""
        packed = self._packed.get(key)
        return len(self._ids.get(key, ())) if packed is None else len(packed[0])

    def check(self, expected: dict[str, set[Key]]) -> None:
        """Verify that exactly these keys are entered for exactly these rollouts."""
        self._unpack_all()
        actual: dict[str, set[Key]] = {}
        for key, ids in self._ids.items():
            for rollout_id in ids:
                actual.setdefault(rollout_id, set()).add(key)
        assert actual == expected, "the indexes differ from the rollouts"


# -- by time -----------------------------------------------------------------------------------------------------------

FEED_LENGTH = 100_000  #: changes kept
CROWD = 100  #: rollouts of one instant that are walked past each time
CROWDED = 100_000  #: ids in all crowds together; the newest one is kept in any case
WATCHED = 200_000  #: ids of rollouts in all sets together; the newest set is kept in any case


class ChangeFeed:
    """The newest changes of a store, in order."""

    def __init__(self, length: int = FEED_LENGTH) -> None:
        self._kept: deque[Change] = deque(maxlen=length)
        self.last: int = 0

    def append(
        self, time: float, kind: str, rollout_id: str | None = None, attempt_id: str | None = None, **detail: Any
    ) -> None:
        """Record one change."""
        self.last += 1
        self._kept.append(Change(self.last, time, kind, rollout_id, attempt_id, detail or None))

    def restore(self, last: int, kept: Iterable[Change]) -> None:
        """Fill an empty feed."""
        self.last = last
        self._kept.extend(kept)

    def __iter__(self) -> Iterator[Change]:
        return iter(self._kept)

    @property
    def oldest(self) -> int:
        """Sequence number of the oldest change that is kept."""
        return self.last - len(self._kept) + 1

    def after(self, cursor: int | None, kinds: Collection[str] | None, limit: int) -> tuple[list[Change], int]:
        """Up to `limit` changes that follow `cursor`, and the cursor behind what was looked at."""
        if cursor is None:
            cursor = self.oldest - 1
        if cursor < self.oldest - 1:
            raise CursorTooOldError(cursor, self.oldest)
        found: list[Change] = []
        wanted = None if kinds is None else frozenset(kinds)
        # A deque is quick at its ends only: what is new stands at the right one.
        new = max(self.last - cursor, 0)
        if new < len(self._kept) // 2:
            following: Iterable[Change] = reversed(list(islice(reversed(self._kept), new)))
        else:
            following = islice(self._kept, cursor - self.oldest + 1, None)
        for change in following:
            if len(found) == limit:
                break
            cursor = change.sequence
            if wanted is None or change.kind in wanted:
                found.append(change)
        return found, cursor

    def of(self, rollout_id: str, since: float = 0.0) -> list[Change]:
        """The kept changes of one rollout since a time. Looks at no older change."""
        newer = takewhile(lambda change: change.time >= since, reversed(self._kept))
        return [change for change in newer if change.rollout_id == rollout_id][::-1]


class CompletionLog:
    """Finished rollouts in the order in which they finished last."""

    def __init__(self) -> None:
        self._sequences: list[int] = []
        self._ids: list[str] = []
        self._place: dict[str, int] = {}
        self.last: int = 0

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, rollout_id: str) -> bool:
        return rollout_id in self._place

    def append(self, rollout_id: str) -> None:
        """Enter a rollout at the tail; an earlier entry of it goes."""
        self.last += 1
        self._place[rollout_id] = self.last
        self._sequences.append(self.last)
        self._ids.append(rollout_id)
        if len(self._ids) > 64 and len(self._ids) > 2 * len(self._place):
            kept = [(s, i) for s, i in zip(self._sequences, self._ids, strict=True) if self._place.get(i) == s]
            self._sequences = [sequence for sequence, _ in kept]
            self._ids = [rollout_id for _, rollout_id in kept]

    def image(self, numbers: dict[str, int]) -> list[Any]:
        """The log, with rollouts by their numbers."""
        kept = list(self.after(None))
        who = array("I", (numbers[rollout_id] for _, rollout_id in kept))
        return [self.last, array("Q", (sequence for sequence, _ in kept)).tobytes(), who.tobytes()]

    def restore(self, image: list[Any], ids: list[str]) -> None:
        """Fill an empty log from an image."""
        self.last, sequences, who = image
        self._sequences, self._ids = list(array("Q", sequences)), [ids[number] for number in array("I", who)]
        self._place = dict(zip(self._ids, self._sequences, strict=True))

    def place(self, rollout_id: str) -> int:
        """Where a finished rollout stands in the log."""
        return self._place[rollout_id]

    def discard(self, rollout_id: str) -> None:
        """Forget a rollout that is no longer finished, or no longer there."""
        self._place.pop(rollout_id, None)

    def after(self, cursor: int | None) -> Iterator[tuple[int, str]]:
        """Sequence number and id of each completion that follows `cursor`."""
        for index in range(bisect_right(self._sequences, cursor or 0), len(self._ids)):
            sequence, rollout_id = self._sequences[index], self._ids[index]
            if self._place.get(rollout_id) == sequence:
                yield sequence, rollout_id


class Crowds:
    """Rollouts of one instant, if they are many, as those of one bulk call are: kept by who has walked past them.

    Of the newest instant the first rollouts come first, so that a page of the newest begins behind all of it.
    """

    def __init__(self) -> None:
        self._ids: OrderedDict[float, tuple[int, list[str]]] = OrderedDict()  # the last that was asked for is last
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def find(self, time: float, newest: int) -> list[str] | None:
        """The rollouts of an instant, in their order; None if it is not kept, or has got newer ones since.

        `newest` is the number of the newest one now. Some may have been deleted since.
        """
        number, ids = self._ids.get(time, (0, []))
        if number < newest:
            return None
        self._ids.move_to_end(time)
        return ids

    def keep(self, time: float, newest: int, rollout_ids: list[str]) -> None:
        """Keep the rollouts of an instant, if they are many."""
        if len(rollout_ids) <= CROWD:
            return
        self._length += len(rollout_ids) - len(self._ids.pop(time, (0, []))[1])
        self._ids[time] = newest, rollout_ids
        while self._length > CROWDED and len(self._ids) > 1:
            _, (_, gone) = self._ids.popitem(last=False)
            self._length -= len(gone)


class WatchSets:
    """Sets of rollouts that callers wait for one after the other, kept between their calls.

    A caller names a set once, and asks then only for what of it has finished since: ten thousand ids do not travel with
    each call. A set that is gone (there were too many, the store was started again) is named again by its caller.
    """

    def __init__(self) -> None:
        self._sets: OrderedDict[int, tuple[str, frozenset[str]]] = OrderedDict()  # the last that was asked for is last
        self._by_session: dict[str, set[int]] = {}
        self._ids = 0

    def __len__(self) -> int:
        return self._ids

    def keep(self, session_id: str, rollout_ids: Iterable[str], seed: int) -> int:
        """Keep a set; a token for it, made of a random seed: the token of another process must mean nothing here."""
        token = (seed + len(self._sets)) % 2**53
        while token in self._sets:
            token += 1
        wanted = frozenset(rollout_ids)
        self._sets[token] = (session_id, wanted)
        self._by_session.setdefault(session_id, set()).add(token)
        self._ids += len(wanted)
        while self._ids > WATCHED and len(self._sets) > 1:
            self.drop(next(iter(self._sets)))
        return token

    def find(self, token: int | None) -> frozenset[str] | None:
        """The set of a token; None for none."""
        if token is None:
            return None
        if token not in self._sets:
            raise AnswerGoneError(token)
        self._sets.move_to_end(token)
        return self._sets[token][1]

    def drop(self, token: int) -> None:
        """Keep a set no longer."""
        if token not in self._sets:
            return
        session_id, wanted = self._sets.pop(token)
        self._ids -= len(wanted)
        there = self._by_session[session_id]
        there.discard(token)
        if not there:
            del self._by_session[session_id]

    def drop_session(self, session_id: str) -> None:
        """A process has ended: nobody asks for its sets."""
        for token in list(self._by_session.get(session_id, ())):
            self.drop(token)
