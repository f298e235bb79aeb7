"""Where a feed reads its items: streams over datasets, each at a position from which it can go on.

A position is an epoch and a cursor, how many items of that epoch were read. A stream gives the same items from the same
position again: of datasets that can be indexed in a seeded order that no list holds, of iterables as they come, with
the state that the iterable itself keeps or by reading from the start. Nothing is read that is not asked for.
Not here: how many items are asked for, and groups of them (`client.pump`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

from raystore.core.payload import CANONICAL
from raystore.errors import InvalidValueError
from raystore.errors.text import summary
from raystore.types.feeds import Sampler
from raystore.wire.codec import digest

SAMPLED = 16  #: items of a dataset of which the fingerprint is made
ROUNDS = 6  #: of the permutation
LEAST_BITS = 8  #: of a number that is permuted: with fewer, some orders of a small dataset are much rarer than others


class Position(NamedTuple):
    """An epoch, and how many of its items were read."""

    epoch: int
    cursor: int


@dataclass(frozen=True, slots=True)
class Drawn:
    """An item of a stream; or, with a reason, one that is passed over."""

    environment: str
    epoch: int
    index: int  #: within its dataset
    item: Any
    why: str | None = None


@dataclass(slots=True)
class Draw:
    """Items that were read in one go, and where that leads; the store takes all of it or nothing."""

    stream: str
    at: Position  # of the first
    to: Position  # behind the last
    over: bool = False
    state_after: bytes | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)  # of groups
    items: list[list[Any]] = field(default_factory=list)  # environment, epoch, index of each
    skipped: list[list[Any]] = field(default_factory=list)  # group id, and why
    ends: list[Position] = field(default_factory=list)  # behind each item

    def arguments(self) -> dict[str, Any]:
        """What the store is told."""
        told = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "ends"}
        return told | {"at": list(self.at), "to": list(self.to)}

    def halves(self) -> tuple[Draw, Draw]:
        """The same in two parts; there is no state of the data between them."""
        middle = len(self.requests) // 2
        cut = self.ends[middle - 1]
        first = Draw(
            self.stream, self.at, cut, requests=self.requests[:middle], items=self.items[:middle],
            skipped=self.skipped, ends=self.ends[:middle],
        )  # fmt: skip
        second = Draw(
            self.stream, cut, self.to, self.over, self.state_after, requests=self.requests[middle:],
            items=self.items[middle:], ends=self.ends[middle:],
        )  # fmt: skip
        return first, second


class Stream(Protocol):
    """Items one after the other. Nothing is read before the first `next`."""

    name: str
    position: Position  #: of the item that comes next
    is_over: bool  #: whether no item follows, as far as it is known

    @property
    def length(self) -> int | None:
        """How many items an epoch has; None if that is not known."""

    def fingerprint(self) -> str | None:
        """What tells this data from other data; None if nothing does. Reads some items."""

    def seek(self, position: Position, state: Any, *, is_over: bool) -> None:
        """Go on from there; `state` is what `state` gave there."""

    def next(self) -> Drawn | None:
        """Read the next item; None if the stream is over."""

    def state(self) -> Any:
        """What the data itself keeps of the position; None if nothing. May be pickled."""


# -- an order ----------------------------------------------------------------------------------------------------------


class Permutation:
    """A seeded order of the numbers below `length`, of which any place can be asked for: no list of it is made.

    A Feistel network over hashes permutes the numbers of an even number of bits; a number that comes out too large is
    put in again, until one below `length` comes out. The order is the same on every machine and Python.
    """

    def __init__(self, length: int, *seeds: object) -> None:
        self.length: int = length
        self._half = max(LEAST_BITS, (length - 1).bit_length() + 1) // 2
        self._mask = (1 << self._half) - 1
        key = blake2b(repr(seeds).encode(), digest_size=32)
        self._keys = [blake2b(key.digest() + bytes((number,)), digest_size=32).digest() for number in range(ROUNDS)]

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < self.length:
            raise IndexError(place)
        number = self._once(place)
        while number >= self.length:
            number = self._once(number)
        return number

    def _once(self, number: int) -> int:
        left, right = number >> self._half, number & self._mask
        for key in self._keys:
            hashed = blake2b(right.to_bytes(8, "little"), digest_size=8, key=key).digest()
            left, right = right, left ^ (int.from_bytes(hashed, "little") & self._mask)
        return left << self._half | right


# -- streams -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Indexed:
    """A dataset that has a length and can be indexed."""

    environment: str
    data: Sequence[Any]
    length: int

    def read(self, epoch: int, index: int) -> Drawn:
        """One item; whatever a dataset raises is the reason why it is passed over."""
        try:
            item = self.data[index]
        except Exception as error:
            return Drawn(self.environment, epoch, index, None, f"reading it raised {summary(error)}")
        return Drawn(self.environment, epoch, index, item, "it is None" if item is None else None)


class IndexedStream:
    """One dataset, or the union of several, in a seeded order epoch by epoch; without a seed in the datasets' order."""

    def __init__(self, feed: str, name: str, parts: Sequence[Indexed], *, epochs: int | None, seed: int | None) -> None:
        self.name: str = name
        self.position: Position = Position(0, 0)
        self.is_over: bool = False
        self._feed = feed
        self._parts = list(parts)
        self._ends: list[int] = []
        for part in parts:
            self._ends.append((self._ends[-1] if self._ends else 0) + part.length)
        self._epochs = epochs
        self._seed = seed
        self._order: tuple[int, Permutation] | None = None  # of an epoch

    @property
    def length(self) -> int:
        return self._ends[-1]

    def fingerprint(self) -> str | None:
        made = blake2b(digest_size=16)
        for part in self._parts:
            found = _fingerprint(part)
            if found is None:
                return None
            made.update(found)
        return made.hexdigest()

    def seek(self, position: Position, state: Any, *, is_over: bool) -> None:
        self.position = position
        self.is_over = self._epochs is not None and position.epoch >= self._epochs  # they may be more than before
        self._turn()

    def _turn(self) -> None:
        """Begin the next epoch if this one is at its end."""
        epoch, cursor = self.position
        if cursor >= self.length:
            self.position = Position(epoch + 1, 0)
            self.is_over = self.is_over or epoch + 1 == self._epochs

    def next(self) -> Drawn | None:
        if self.is_over:
            return None
        epoch, cursor = self.position
        flat = self._place(epoch, cursor)
        number = bisect_right(self._ends, flat)
        drawn = self._parts[number].read(epoch, flat - (self._ends[number - 1] if number else 0))
        self.position = Position(epoch, cursor + 1)
        self._turn()
        return drawn

    def _place(self, epoch: int, cursor: int) -> int:
        if self._seed is None:
            return cursor
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, Permutation(self.length, self._seed, self._feed, self.name, epoch)
        return self._order[1][cursor]

    def state(self) -> None:
        return None


class IteratedStream:
    """An iterable in its own order, epoch by epoch; or an iterator, which can be read once."""

    def __init__(self, name: str, environment: str, data: Any, *, epochs: int | None) -> None:
        self.name: str = name
        self.position: Position = Position(0, 0)
        self.is_over: bool = False
        self._environment = environment
        self._data = data
        self._epochs = epochs
        self._is_once = is_iterator(data)
        self._items: Iterator[Any] | None = None  # at the position
        self._is_empty = True  # whether this epoch has given nothing so far

    @property
    def length(self) -> None:
        return None

    def fingerprint(self) -> None:
        return None

    def seek(self, position: Position, state: Any, *, is_over: bool) -> None:
        has_epochs = not self._is_once and (self._epochs is None or position.epoch < self._epochs)
        self.is_over = is_over and not has_epochs  # there may be more epochs than before
        if self.is_over or (self._items is not None and position == self.position):
            self.position = position
            return
        if self._items is not None and self._is_once:
            self._skip(position)
            return
        self.position, self._items = Position(position.epoch, 0), None
        self._is_empty = not position.cursor
        if state is not None and (items := self._restored(state)) is not None:
            self._items, self.position = items, position
        self._skip(position)

    def _restored(self, state: Any) -> Iterator[Any] | None:
        """The items that follow a state; None if neither the data nor its iterator takes one."""
        data: Any = self._data
        self._tell_epoch()
        if _keeps_state(data):
            data.load_state_dict(state)
            following: Iterator[Any] = iter(data)
            return following
        items: Any = None if self._is_once else iter(data)
        if not _keeps_state(items):
            return None
        items.load_state_dict(state)
        return items  # type: ignore[no-any-return]

    def _skip(self, position: Position) -> None:
        """Read forward to a position, from the start of its epoch or from where the iterator is."""
        if position.epoch != self.position.epoch or position.cursor < self.position.cursor:
            raise InvalidValueError(
                "data", self._data,
                f"an iterable that can be read again, since the feed goes on at item {position.cursor} of epoch "
                f"{position.epoch} and this iterator is past it",
            )  # fmt: skip
        while self.position.cursor < position.cursor:
            try:
                next(self._begun())
            except StopIteration:  # it is shorter than it was
                break
            self._is_empty = False
            self.position = Position(position.epoch, self.position.cursor + 1)
        self.position = position

    def _begun(self) -> Iterator[Any]:
        """The items of this epoch."""
        if self._items is None:
            self._tell_epoch()
            self._items = iter(self._data)
        return self._items

    def _tell_epoch(self) -> None:
        if callable(set_epoch := getattr(self._data, "set_epoch", None)):  # by which some shuffle anew
            set_epoch(self.position.epoch)

    def next(self) -> Drawn | None:
        while not self.is_over:
            epoch, cursor = self.position
            # Whatever iterating raises goes out: a generator that has raised is at its end, and what it has left would
            # be lost without a word.
            try:
                item = next(self._begun())
            except StopIteration:
                self.is_over = self._is_once or epoch + 1 == self._epochs or self._is_empty
                self.position, self._items, self._is_empty = Position(epoch + 1, 0), None, True
                continue
            self._is_empty = False
            self.position = Position(epoch, cursor + 1)
            return Drawn(self._environment, epoch, cursor, item, "it is None" if item is None else None)
        return None

    def state(self) -> Any:
        if self._items is None or self.position.cursor == 0:
            return None
        holder: Any = self._data if _keeps_state(self._data) else self._items
        return holder.state_dict() if _keeps_state(holder) else None


class SampledStream:
    """What a user's sampler gives, for as long as it gives something; epochs are its own business."""

    def __init__(self, name: str, environment: str, sampler: Sampler) -> None:
        self.name: str = name
        self.position: Position = Position(0, 0)
        self.is_over: bool = False
        self._environment = environment
        self._sampler = sampler

    @property
    def length(self) -> None:
        return None

    def fingerprint(self) -> None:
        return None

    def seek(self, position: Position, state: Any, *, is_over: bool) -> None:
        sampler: Any = self._sampler
        if state is not None and position != self.position and _keeps_state(sampler):
            sampler.load_state_dict(state)
        self.position, self.is_over = position, is_over

    def next(self) -> Drawn | None:
        if self.is_over:
            return None
        item = self._sampler.next()
        if item is None:
            self.is_over = True
            return None
        cursor = self.position.cursor
        self.position = Position(0, cursor + 1)
        return Drawn(self._environment, 0, cursor, item)

    def state(self) -> Any:
        sampler: Any = self._sampler
        return sampler.state_dict() if _keeps_state(sampler) else None


def _keeps_state(data: Any) -> bool:
    return all(callable(getattr(data, name, None)) for name in ("state_dict", "load_state_dict"))


def _fingerprint(part: Indexed) -> bytes | None:
    """A digest of a dataset's length and some of its items; None if these have no canonical form.

    Of Hugging Face's datasets too: their own fingerprint is another one in each process, if a function that made them
    cannot be hashed.
    """
    made = blake2b(f"{part.environment!r} {part.length}".encode(), digest_size=16)
    steps = min(SAMPLED, part.length)
    for number in range(steps):
        drawn = part.read(0, number * (part.length - 1) // max(steps - 1, 1))
        found = digest(drawn.item, None) if drawn.why is None else bytes((CANONICAL,))
        if found[0] != CANONICAL:
            return None
        made.update(found)
    return made.digest()


# -- from what a user passes to streams --------------------------------------------------------------------------------

A_DATASET = "a dataset: something with a length that can be indexed (a list, a map-style dataset), or an iterable"


def is_iterator(data: Any) -> bool:
    """Whether this can be read once only."""
    return hasattr(type(data), "__next__")


def is_indexed(data: Any) -> bool:
    """Whether this has a length and can be indexed; torch's `IterableDataset` only looks so."""
    if any(cls.__name__ == "IterableDataset" for cls in type(data).__mro__):
        return False
    return all(hasattr(type(data), name) for name in ("__len__", "__getitem__"))


def streams_of(
    feed: str,
    data: Any,
    *,
    mix: Mapping[str, float] | None,
    sampler: Sampler | None,
    epochs: int | None,
    seed: int | None,
) -> list[tuple[Stream, float]]:
    """The streams of a feed, each with its share of a batch. Raises `InvalidValueError`; reads nothing."""
    if sampler is not None:
        if data is not None:
            raise InvalidValueError("data", data, "None, since the sampler gives the items")
        return [(SampledStream("", feed, sampler), 1.0)]
    named = dict(data) if isinstance(data, Mapping) else {feed: data}
    if not named:
        raise InvalidValueError("data", data, "at least one dataset")
    for environment, one in named.items():
        place = f"data[{environment!r}]" if isinstance(data, Mapping) else "data"
        check_dataset(place, one, epochs)
    if mix is None:
        iterated = [name for name, one in named.items() if not is_indexed(one)]
        if iterated and len(named) > 1:
            expected = (
                f"the share of each dataset, since {iterated[0]!r} has no length: mix={{{iterated[0]!r}: 0.5, ...}}"
            )
            raise InvalidValueError("mix", None, expected)
        if iterated:
            return [(IteratedStream("", name, one, epochs=epochs), 1.0) for name, one in named.items()]
        parts = [Indexed(name, one, len(one)) for name, one in named.items()]
        return [(IndexedStream(feed, "", parts, epochs=epochs, seed=seed), 1.0)]
    streams: list[tuple[Stream, float]] = []
    for name, share in mix.items():
        one = named[name]
        if is_indexed(one):
            parts = [Indexed(name, one, len(one))]
            streams.append((IndexedStream(feed, name, parts, epochs=epochs, seed=seed), share))
        else:
            streams.append((IteratedStream(name, name, one, epochs=epochs), share))
    return streams


def check_dataset(place: str, data: Any, epochs: int | None = 1) -> None:
    """Refuse what cannot be read, item by item, so many times; reads nothing."""
    if isinstance(data, (str, bytes, Mapping)) or not (is_indexed(data) or hasattr(type(data), "__iter__")):
        raise InvalidValueError(place, data, A_DATASET)
    if isinstance(data, (set, frozenset)):
        raise InvalidValueError(place, data, "something with an order, as sorted(...) gives it")
    if is_indexed(data) and not len(data):
        raise InvalidValueError(place, data, "at least one item")
    if is_iterator(data) and epochs != 1:
        expected = "1, since an iterator can be read once; pass what makes one, with __iter__"
        raise InvalidValueError("epochs", epochs, expected)
