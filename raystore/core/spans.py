"""Spans as encoded bodies with a small index, their numbers and their bytes.

The table also keeps the sequence counters. The rest of the core gets only a summary of each write (`SpansWritten`), so
that spans could be stored on another node than their rollouts.
The index of a rollout may be on disk only (in a snapshot), and is read when somebody asks for it.
Not here: whether rollout and attempt exist, what a span does to a status (`attempts`).
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from raystore.core.payload import OnDisk, Payload, size_of
from raystore.core.records import Span

#: Bytes of process memory that one stored span takes beside its body and its texts (record, dictionary entry, keys),
#: and what the first of a rollout takes in addition. Measured by `benchmarks/accounting.py`: with these the accounted
#: total is within 10 % of the growth in RSS.
SPAN_OVERHEAD_BYTES = 700
FIRST_SPAN_BYTES = 500

#: Numbers may be asked for rollouts that do not exist (the contract is lenient); only so many of those are remembered.
UNKNOWN_COUNTERS = 10_000

NUMBERS = 1 << 20  #: below a place on disk there is room for a number up to this


def accounted(span: Span) -> int:
    """Bytes that a span counts for when no custom estimator is set, apart from being the first of its rollout."""
    body = span.body
    return (
        SPAN_OVERHEAD_BYTES
        + (len(body) if type(body) is bytes else size_of(body))
        + len(span.span_id)
        + len(span.trace_id)
        + len(span.name)
        + len(span.parent_id or "")
    )


@dataclass(slots=True)
class SpansWritten:
    """What one batch of spans of one attempt came to."""

    stored: list[bool]  # for each span, in order: False for a duplicate
    bytes: int
    reward: float | None
    are_first: bool = False  # no span of their rollout was in memory before


@dataclass(slots=True, eq=False)
class _Stored:
    """The spans of one rollout."""

    spans: dict[tuple[str, str] | int, Span] = field(default_factory=dict)
    bytes: int = 0
    cached: int = 0  # spans of which the body is in memory
    places: array[int] | None = None  # in a journal, in the order of the spans


Index = tuple["array[int]", list[list[Any]]]  #: of one rollout: where each body is in a journal, and a row for each


def _row(span: Span) -> list[Any]:
    """A span without its rollout; of a body on disk only how long it is."""
    body = span.body.size if isinstance(span.body, OnDisk) else span.body
    return [*span.row()[1:-2], body, span.size]


def _indexed(rollout_id: str, index: Index) -> list[Span]:
    spans = [Span(rollout_id, *row) for row in index[1]]
    for place, span in zip(index[0], spans, strict=True):
        body: Any = span.body
        if isinstance(body, int):
            span.body = OnDisk(place, body)
    return spans


class SpanTable:
    """All spans of a store.

    With a journal a body is on disk once, and in memory as long as there is room.
    """

    def __init__(self, *, keep_duplicates: bool) -> None:
        self.keep_duplicates = keep_duplicates
        self.keeps_bodies = True  # else every body stays where it is on disk
        self.written = 0  # records of a journal up to here can be read from disk
        self.by_rollout: dict[str, _Stored] = {}
        self._on_disk: dict[str, int] = {}  # rollouts whose index is on disk: where (times NUMBERS), newest number
        self.read_index: Callable[[int], Index] = lambda place: (array("Q"), [])
        self._counters: dict[str, int] = {}
        self._unknown: OrderedDict[str, int] = OrderedDict()
        self.evicted: set[str] = set()
        self.count: int = 0
        self.bytes: int = 0
        self.evicted_spans: int = 0

    # -- numbers -------------------------------------------------------------------------------------------------

    def next_number(self, rollout_id: str, *, known: bool) -> int:
        """The next sequence number of a rollout; numbers start at 1 and are never given twice."""
        if known:
            number = self._newest(rollout_id) + 1
            self._counters[rollout_id] = number
            return number
        number = self._unknown.pop(rollout_id, 0) + 1
        self._unknown[rollout_id] = number
        if len(self._unknown) > UNKNOWN_COUNTERS:
            self._unknown.popitem(last=False)
        return number

    def adopt_numbers(self, rollout_id: str) -> None:
        """A rollout is there from now on, of which numbers may have been given before."""
        if self._unknown and (number := self._unknown.pop(rollout_id, 0)):
            self._counters[rollout_id] = number

    def counters(self) -> list[tuple[str, int]]:
        """The newest number of each rollout that has one, also of those that do not exist."""
        on_disk = ((i, known % NUMBERS) for i, known in self._on_disk.items() if i not in self._counters)
        found = (*self._counters.items(), *on_disk, *self._unknown.items())
        return [(rollout_id, number) for rollout_id, number in found if number]

    def newest_number(self, rollout_id: str) -> int:
        """The highest number that a span of a rollout has, or was given; 0 if there is none."""
        return self._newest(rollout_id)

    def _newest(self, rollout_id: str) -> int:
        number = self._counters.get(rollout_id)
        return self._on_disk.get(rollout_id, 0) % NUMBERS if number is None else number

    # -- writing -------------------------------------------------------------------------------------------------

    def add(self, rollout_id: str, spans: Iterable[Span], places: Iterable[int] | None = None) -> SpansWritten:
        """Store spans of one attempt; one whose id the attempt already has is refused, unless duplicates are kept.

        `places` says where in a journal each body is, if there is one.
        """
        if places is not None:
            return self._add_on_disk(rollout_id, list(spans), list(places))
        held = self.by_rollout.get(rollout_id) or self._held(rollout_id) or _Stored()
        written = SpansWritten([], 0, None)
        kept, stored, size, highest = held.spans, written.stored, 0, 0
        before = len(kept)
        for span in spans:
            key: tuple[str, str] | int = (span.attempt_id, span.span_id)
            if key in kept:
                if not self.keep_duplicates:
                    stored.append(False)
                    continue
                key = len(kept)  # spans of a rollout are only ever removed together, so this is unused
            bytes_ = span.size
            if bytes_ < 0:  # no custom estimator
                bytes_ = span.size = accounted(span) + (0 if kept else FIRST_SPAN_BYTES)
            kept[key] = span
            stored.append(True)
            size += bytes_
            if span.sequence_id > highest:
                highest = span.sequence_id
            if span.reward is not None:
                written.reward = span.reward
        if kept:
            self.by_rollout[rollout_id] = held
        written.are_first = held.cached == 0 and len(kept) > before
        held.cached += len(kept) - before
        written.bytes = size
        held.bytes += size
        self.bytes += size
        self.count += len(kept) - before
        known = self._counters.get(rollout_id)
        if highest > (self._newest(rollout_id) if known is None else known):
            self._counters[rollout_id] = highest
        return written

    def _add_on_disk(self, rollout_id: str, spans: list[Span], places: list[int]) -> SpansWritten:
        if not self.keeps_bodies:
            for span, place in zip(spans, places, strict=True):
                body = size_of(span.body)
                if place and not (isinstance(span.body, Payload) and span.body.refs):
                    span.body, span.size = OnDisk(place, body), span.size - min(body, max(span.size, 0))
        written = self.add(rollout_id, spans)
        if any(written.stored):
            held = self.by_rollout[rollout_id]
            if held.places is None:
                held.places = array("Q")
            for span, place, is_stored in zip(spans, places, written.stored, strict=True):
                if is_stored:
                    held.places.append(place)
                    held.cached -= type(span.body) is OnDisk
            written.are_first = written.are_first and held.cached > 0
        return written

    # -- an index on disk ----------------------------------------------------------------------------------------

    def _held(self, rollout_id: str) -> _Stored | None:
        """The spans of a rollout, in memory from now on."""
        held = self.by_rollout.get(rollout_id)
        known = self._on_disk.pop(rollout_id, 0) if held is None else 0
        if not known:
            return held
        place, newest = divmod(known, NUMBERS)
        self._counters.setdefault(rollout_id, newest)
        index = self.read_index(place)
        held = self.by_rollout[rollout_id] = _Stored()
        for number, span in enumerate(_indexed(rollout_id, index)):
            key: tuple[str, str] | int = (span.attempt_id, span.span_id)
            held.spans[number if key in held.spans else key] = span
        held.places = index[0]
        held.bytes = sum(span.size for span in held.spans.values())
        self.bytes += held.bytes
        return held

    def place(self, rollout_id: str) -> int:
        """Where on disk the index of a rollout is; 0 if it is in memory, or empty."""
        return self._on_disk.get(rollout_id, 0) // NUMBERS

    def index(self, rollout_id: str) -> Index | None:
        """The index of a rollout that is in memory, to be written to disk."""
        held = self.by_rollout.get(rollout_id)
        if held is None or held.places is None:
            return None
        return held.places, [_row(span) for span in held.spans.values()]

    def image(self, ids: Iterable[str], places: dict[str, int]) -> list[Any]:
        """The newest number of each rollout, and where its index was written to; and what is no rollout's own."""
        newest = [self._newest(rollout_id) for rollout_id in ids]
        known = [places.get(i, 0) * NUMBERS + min(n, NUMBERS - 1) for i, n in zip(ids, newest, strict=True)]
        high = [(i, n) for i, n in zip(ids, newest, strict=True) if n and (n >= NUMBERS or i not in places)]
        unknown = list(self._unknown.items())
        return [array("Q", known).tobytes(), high, list(self.evicted), self.count, unknown, self.evicted_spans]

    def restore(self, image: list[Any], ids: list[str]) -> None:
        """Fill an empty table from an image."""
        elsewhere, high, evicted, self.count, unknown, self.evicted_spans = image
        self._counters = dict(high)
        self._on_disk = {i: known for i, known in zip(ids, array("Q", elsewhere), strict=True) if known >= NUMBERS}
        self.evicted.update(evicted)
        self._unknown.update(unknown)

    # -- reading -------------------------------------------------------------------------------------------------

    def of(self, rollout_id: str, attempt_id: str | None = None) -> list[Span]:
        """The spans of a rollout, or of one of its attempts, in the order of their arrival."""
        held = self.by_rollout.get(rollout_id)
        if held is not None:
            spans = list(held.spans.values())
        elif rollout_id in self._on_disk:
            spans = _indexed(rollout_id, self.read_index(self.place(rollout_id)))
        else:
            return []
        return spans if attempt_id is None else [span for span in spans if span.attempt_id == attempt_id]

    def latest(self, rollout_id: str) -> Span | None:
        """The span of a rollout that came last; None if none is in memory."""
        held = self.by_rollout.get(rollout_id)
        return next(reversed(held.spans.values()), None) if held is not None else None

    def has(self, rollout_id: str) -> bool:
        """Whether there is a span to evict."""
        held = self.by_rollout.get(rollout_id)
        return held is not None and held.cached > 0

    # -- freeing -------------------------------------------------------------------------------------------------

    def evict(self, rollout_id: str) -> tuple[int, int]:
        """Free the spans of a rollout: how many, and how many bytes.

        With a journal their bodies leave the memory. Without one they are gone, which is remembered.
        """
        held = self.by_rollout[rollout_id]
        if held.places is not None:
            return self._drop_bodies(held)
        self._remove(rollout_id)
        self.evicted.add(rollout_id)
        self.evicted_spans += len(held.spans)
        return len(held.spans), held.bytes

    def _drop_bodies(self, held: _Stored) -> tuple[int, int]:
        """Let bodies be on disk only; how many, and how many bytes."""
        assert held.places is not None
        dropped = freed = 0
        for (key, span), place in zip(list(held.spans.items()), held.places, strict=True):
            if isinstance(span.body, OnDisk):
                continue
            has_refs = isinstance(span.body, Payload) and span.body.refs  # which are not on disk
            if not place or has_refs or OnDisk.parts(place)[0] > self.written:
                continue
            body = size_of(span.body)
            size = min(body, span.size)
            held.spans[key] = span.evolve(body=OnDisk(place, body), size=span.size - size)
            freed += size
            dropped += 1
        held.bytes -= freed
        held.cached -= dropped
        self.bytes -= freed
        return dropped, freed

    def forget(self, rollout_id: str) -> None:
        """Drop everything about a rollout that is deleted."""
        if self._held(rollout_id) is not None:
            self._remove(rollout_id)
        self.evicted.discard(rollout_id)
        self._counters.pop(rollout_id, None)

    def _remove(self, rollout_id: str) -> None:
        held = self.by_rollout.pop(rollout_id)
        self.bytes -= held.bytes
        self.count -= len(held.spans)

    def check(self, rollout_ids: Iterable[str]) -> None:
        """Verify the sums, and that every span belongs to a rollout that exists."""
        known = set(rollout_ids)
        assert self._on_disk.keys() <= known, "spans on disk of an unknown rollout"
        assert self.by_rollout.keys() <= known, "spans of an unknown rollout"
        assert self.evicted <= known, "an evicted mark of an unknown rollout"
        assert self._counters.keys() <= known, "a counter of an unknown rollout"
        for rollout_id, held in self.by_rollout.items():
            assert held.spans, f"an empty span list of {rollout_id}"
            assert held.bytes == sum(span.size for span in held.spans.values()), f"span bytes of {rollout_id}"
            highest = max(span.sequence_id for span in held.spans.values())
            assert self._counters.get(rollout_id, 0) >= highest, f"counter of {rollout_id} below its spans"
        assert self.bytes == sum(held.bytes for held in self.by_rollout.values()), "total span bytes"
        elsewhere = sum(len(self.read_index(place)[0]) for place in map(self.place, self._on_disk))
        assert self.count == elsewhere + sum(len(held.spans) for held in self.by_rollout.values()), "span count"
        assert not self._on_disk.keys() & self.by_rollout.keys(), "spans that are in memory and on disk"
