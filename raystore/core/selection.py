"""What a feed has trained on, and what of its work it has thrown away.

Each rollout of a feed that was started is counted once, when the fate of its group is known: in which *ending*, with
which reason, how long it ran, its turns, generated tokens and reward, its environment, tags and policy version. A batch
that is undone is counted out again. Counts are exact. Numbers are kept as sketches: counts in classes that grow by a
tenth each, so that a quantile is within 5 %, and two sketches add up to that of both. A rollout that was cut off while
it ran says only that it would have run longer, so that those durations are apart.
All of it is bounded: time is in windows, of which older ones are merged, so that an answer about the last hour does not
need the whole run. It decides nothing, so it is in snapshots and in no digest.
Not here: which ending a rollout has (`fates`), what the numbers mean (`reports.selection`).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from raystore.core.records import declare, packed, unpacked

WINDOW_SECONDS = 600.0  #: of the newest windows; each merge doubles it
ALIKE = 3  #: windows of one length that are kept; one more, and the two oldest of them become one
VALUES = 100  #: of a dimension in one window; others count as OTHER
REASONS = 20  #: of an ending in one window, likewise
OTHER = "other"
ITEMS = 4_000_000  #: of which it is known whether they were ever trained on; of those beyond only how many there are
CHUNK = 4_096  #: of these in one number

_GROWTH = math.log(1.1)
_LEAST, _MOST = -150, 300  #: classes: from some 1e-6 to 1e12
_BETWEEN = 1 - _LEAST  #: so that classes of numbers above 0 are above 0


def class_of(value: float) -> int:
    """The class of a number; those of greater numbers are greater, and that of -x is that of x below 0."""
    if value == 0.0:
        return 0
    place = math.ceil(math.log(abs(value)) / _GROWTH)
    place = min(max(place, _LEAST), _MOST) + _BETWEEN
    return place if value > 0 else -place


def middle_of(number: int) -> float:
    """The number in the middle of a class."""
    if number == 0:
        return 0.0
    return math.copysign(math.exp((abs(number) - _BETWEEN - 0.5) * _GROWTH), number)


class Spread:
    """How numbers are distributed. Numbers may be taken out again."""

    __slots__ = ("count", "counts", "first", "squares", "total")

    def __init__(self) -> None:
        self.first: int = 0  #: class of the first of `counts`
        self.counts: array[int] = array("I")
        self.count: int = 0
        self.total: float = 0.0
        self.squares: float = 0.0

    def add(self, value: float | None, times: int = 1) -> None:
        """One number more, or (-1) one less; None is none."""
        if value is None or not math.isfinite(value):
            return
        self._count(class_of(value), times)
        self.count += times
        self.total += times * value
        self.squares += times * value * value

    def _count(self, number: int, times: int) -> None:
        counts = self.counts
        if not counts:
            self.first = number
        if number < self.first:
            counts[:0] = array("I", bytes(4 * (self.first - number)))
            self.first = number
        elif number >= self.first + len(counts):
            counts.frombytes(bytes(4 * (number + 1 - self.first - len(counts))))
        counts[number - self.first] += times

    def merge(self, other: Spread) -> None:
        """The numbers of another one too."""
        for number, count in other.classes():
            self._count(number, count)
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    def classes(self) -> Iterator[tuple[int, int]]:
        """Each class with how many numbers are in it, ascending."""
        return ((self.first + place, count) for place, count in enumerate(self.counts) if count)

    def image(self) -> list[Any]:
        """All of it as plain data."""
        return [self.first, list(self.counts), self.count, self.total, self.squares]

    @classmethod
    def of(cls, image: list[Any]) -> Spread:
        """It again."""
        made = cls()
        made.first, counts, made.count, made.total, made.squares = image
        made.counts = array("I", counts)
        return made


class Fate(NamedTuple):
    """What became of a rollout that was started."""

    ending: str
    reason: str
    is_cut: bool  #: it would have run longer
    seconds: float | None
    turns: int | None
    tokens: int | None
    reward: float | None
    version: int | None


_AS_SPREAD: dict[str, Any] = {"make": Spread, "pack": Spread.image, "unpack": Spread.of}


@dataclass(slots=True, eq=False)
class Ended:
    """The rollouts of one ending."""

    groups: int = declare(0)  #: that ended so
    rollouts: int = declare(0)
    reasons: dict[str, int] = declare(make=dict)
    seconds: Spread = declare(**_AS_SPREAD)  #: of those that ran to their end
    cut: Spread = declare(**_AS_SPREAD)  #: of those that did not
    turns: Spread = declare(**_AS_SPREAD)
    tokens: Spread = declare(**_AS_SPREAD)
    reward: Spread = declare(**_AS_SPREAD)

    def add(self, fate: Fate, times: int) -> None:
        """One rollout more, or less."""
        self.rollouts += times
        reason = _bounded(fate.reason, self.reasons, REASONS)
        self.reasons[reason] = self.reasons.get(reason, 0) + times
        (self.cut if fate.is_cut else self.seconds).add(fate.seconds, times)
        self.turns.add(fate.turns, times)
        self.tokens.add(fate.tokens, times)
        self.reward.add(fate.reward, times)

    def merge(self, other: Ended) -> None:
        """Those of another window too."""
        self.groups += other.groups
        self.rollouts += other.rollouts
        for reason, count in other.reasons.items():
            known = _bounded(reason, self.reasons, REASONS)
            self.reasons[known] = self.reasons.get(known, 0) + count
        for name in ("seconds", "cut", "turns", "tokens", "reward"):
            getattr(self, name).merge(getattr(other, name))


def _bounded(key: Any, known: Mapping[Any, Any], most: int, other: Any = OTHER) -> Any:
    return key if key in known or len(known) < most else other


Value = tuple[str, str]  #: dimension and value: ("environment", "math"), ("tag level", "3"), ("version", "12")
#: Of a value: rollouts that were started; with a reward; sum of these; the same of those that were trained on.
Tally = list[float]


@dataclass(slots=True, eq=False)
class Window:
    """What came to its end in some time."""

    since: float
    until: float
    length: int = declare(1)  #: how many windows it was
    endings: dict[str, Ended] = declare(
        make=dict,
        pack=lambda endings: {name: packed(one) for name, one in endings.items()},
        unpack=lambda rows: {name: unpacked(Ended, row) for name, row in rows.items()},
    )
    values: dict[Value, Tally] = declare(
        make=dict,
        pack=lambda values: [[*key, tally] for key, tally in values.items()],
        unpack=lambda rows: {(dimension, value): tally for dimension, value, tally in rows},
    )
    #: Of those that ran to their end with a reward, by class of duration: how many, sum of rewards, and of squares.
    by_seconds: dict[int, Tally] = declare(make=dict, pack=lambda rows: list(rows.items()), unpack=dict)
    #: Items by environment and ending.
    items: dict[Value, int] = declare(
        make=dict,
        pack=lambda items: [[*key, count] for key, count in items.items()],
        unpack=lambda rows: {(environment, ending): count for environment, ending, count in rows},
    )

    def add(self, fates: Iterable[Fate], values: list[Value], times: int) -> None:
        """Count the members of a group in, or (-1) out."""
        for fate in fates:
            ended = self.endings.get(fate.ending)
            if ended is None:
                ended = self.endings[fate.ending] = Ended()
            ended.add(fate, times)
            reward = fate.reward if fate.reward is not None and math.isfinite(fate.reward) else None
            is_trained = fate.ending == "trained"
            of_version = [] if fate.version is None else [("version", str(fate.version))]
            for key in (*values, *of_version):
                tally = self._tally(key)
                tally[0] += times
                tally[3] += times * is_trained
                if reward is not None:
                    tally[1] += times
                    tally[2] += times * reward
                    if is_trained:
                        tally[4] += times
                        tally[5] += times * reward
            if reward is not None and fate.seconds is not None and not fate.is_cut:
                number = class_of(fate.seconds)
                row = self.by_seconds.get(number)
                if row is None:
                    row = self.by_seconds[number] = [0, 0.0, 0.0]
                row[0] += times
                row[1] += times * reward
                row[2] += times * reward * reward

    def _tally(self, key: Value) -> Tally:
        tally = self.values.get(key)
        if tally is None:
            if sum(dimension == key[0] for dimension, _ in self.values) >= VALUES:
                key = (key[0], OTHER)
            tally = self.values.setdefault(key, [0, 0, 0.0, 0, 0, 0.0])
        return tally

    def merge(self, other: Window) -> None:
        """What came to its end in another time too."""
        self.since, self.until = min(self.since, other.since), max(self.until, other.until)
        self.length += other.length
        for name, ended in other.endings.items():
            self.endings.setdefault(name, Ended()).merge(ended)
        for key, more in other.values.items():
            tally = self._tally(key)
            for place, value in enumerate(more):
                tally[place] += value
        for number, more in other.by_seconds.items():
            row = self.by_seconds.setdefault(number, [0, 0.0, 0.0])
            for place, value in enumerate(more):
                row[place] += value
        for pair, count in other.items.items():
            self.items[pair] = self.items.get(pair, 0) + count


class Bits:
    """Which items of a dataset something is true of, by index."""

    def __init__(self) -> None:
        self.chunks: dict[int, int] = {}

    def __contains__(self, index: int) -> bool:
        return bool(self.chunks.get(index // CHUNK, 0) >> index % CHUNK & 1)

    def put(self, index: int, is_so: bool) -> None:
        """Say it of an item, or not any more."""
        number, bit = index // CHUNK, 1 << index % CHUNK
        chunk = self.chunks.get(number, 0)
        self.chunks[number] = chunk | bit if is_so else chunk & ~bit

    def without(self, others: Bits) -> tuple[int, Iterator[int]]:
        """How many items it is true of and the other is not; and these, ascending."""
        left = {n: chunk & ~others.chunks.get(n, 0) for n, chunk in sorted(self.chunks.items())}
        return sum(chunk.bit_count() for chunk in left.values()), self._indexes(left)

    @staticmethod
    def _indexes(chunks: dict[int, int]) -> Iterator[int]:
        for number, chunk in chunks.items():
            while chunk:
                lowest = chunk & -chunk
                yield number * CHUNK + lowest.bit_length() - 1
                chunk ^= lowest

    def image(self) -> list[Any]:
        """All of it as plain data."""
        return [[number, chunk.to_bytes(CHUNK // 8, "little")] for number, chunk in self.chunks.items() if chunk]

    @classmethod
    def of(cls, image: list[Any]) -> Bits:
        """It again."""
        made = cls()
        made.chunks = {number: int.from_bytes(chunk, "little") for number, chunk in image}
        return made


class Selection:
    """What became of the rollouts and items of one feed."""

    def __init__(self) -> None:
        self.windows: list[Window] = []  #: the oldest first
        self.ended: dict[str, Bits] = {}  #: items by environment that came to an end, in any epoch,
        self.trained: dict[str, Bits] = {}  #: and of these, those that were trained on in one
        self.untracked: int = 0  #: ends of items whose index is too high for that

    def at(self, now: float) -> Window:
        """The window of an instant, which is no earlier than those before."""
        if not self.windows or now >= self.windows[-1].since + WINDOW_SECONDS or self.windows[-1].length > 1:
            self.windows.append(Window(now, now))
            self._shorten()
        newest = self.windows[-1]
        newest.until = max(newest.until, now)
        return newest

    def _shorten(self) -> None:
        """Merge older windows, so that there are few of each length."""
        length = 1
        while True:
            alike = [place for place, window in enumerate(self.windows) if window.length == length]
            if len(alike) <= ALIKE:
                return
            first = alike[0]
            self.windows[first].merge(self.windows.pop(first + 1))
            length = self.windows[first].length

    def count(self, now: float, fates: list[Fate], values: list[Value], ending: str) -> None:
        """Count the members of a group that has come to an ending."""
        window = self.at(now)
        window.add(fates, values, 1)
        window.endings.setdefault(ending, Ended()).groups += 1

    def count_item(self, now: float, environment: str, index: int, ending: str) -> bool:
        """Count the ending of an item; whether it is the first time that it is trained on."""
        window = self.at(now)
        window.items[environment, ending] = window.items.get((environment, ending), 0) + 1
        if index >= ITEMS:
            self.untracked += 1
            return False
        if len(self.ended) >= VALUES and environment not in self.ended:
            self.untracked += 1
            return False
        self.ended.setdefault(environment, Bits()).put(index, True)
        trained = self.trained.setdefault(environment, Bits())
        is_first = ending == "trained" and index not in trained
        if is_first:
            trained.put(index, True)
        return is_first

    def undo(self, then: float, fates: list[Fate], values: list[Value], item: tuple[str, int], was_first: bool) -> None:
        """A group that was trained on `then` was not, after all; nor is its item at an end."""
        window = next((one for one in reversed(self.windows) if one.since <= then), self.windows[0])
        window.add(fates, values, -1)
        window.endings["trained"].groups -= 1
        window.items[item[0], "trained"] -= 1
        if was_first:
            self.trained[item[0]].put(item[1], False)

    def since(self, time: float | None) -> Window | None:
        """What came to its end from an instant on; perhaps from somewhat earlier on. None if nothing did."""
        found: Window | None = None
        for window in self.windows:
            if time is None or window.until >= time:
                if found is None:
                    found = Window(window.since, window.until)
                found.merge(window)
        return found

    def starved(self, shown: int) -> list[list[Any]]:
        """Items that came to an end and were never trained on: environment, how many, and the indexes of the first."""
        rows = []
        for environment, ended in self.ended.items():
            count, indexes = ended.without(self.trained[environment])
            if count:
                rows.append([environment, count, [index for _, index in zip(range(shown), indexes, strict=False)]])
        return rows

    # -- snapshots ---------------------------------------------------------------------------------------------------

    def image(self) -> list[Any]:
        """All of it as plain data."""
        bits = [[name, bits.image(), self.trained[name].image()] for name, bits in self.ended.items()]
        return [[packed(window) for window in self.windows], bits, self.untracked]

    @classmethod
    def of(cls, image: list[Any]) -> Selection:
        """It again."""
        made = cls()
        windows, bits, made.untracked = image
        made.windows = [unpacked(Window, row) for row in windows]
        for name, ended, trained in bits:
            made.ended[name], made.trained[name] = Bits.of(ended), Bits.of(trained)
        return made
