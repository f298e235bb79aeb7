"""Where a feed reads its items: the order of an epoch, going on from a position, fingerprints, what is a dataset."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

import raystore as rs
from raystore.client.datasets import (
    Draw,
    Indexed,
    IndexedStream,
    IteratedStream,
    Permutation,
    Position,
    Stream,
    streams_of,
)


def only(data: Any, *, epochs: int | None = 1, seed: int | None = 0, feed: str = "f", **more: Any) -> Stream:
    """The one stream over this data."""
    ((stream, _),) = streams_of(feed, data, **{"mix": None, "sampler": None, "epochs": epochs, "seed": seed, **more})
    return stream


def drawn(stream: Stream, count: int = 1_000) -> list[tuple[str, int, int, Any]]:
    """Up to so many items, without reasons."""
    found = itertools.takewhile(lambda one: one is not None, (stream.next() for _ in range(count)))
    return [(one.environment, one.epoch, one.index, one.item) for one in found if one is not None]


# -- the order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 10, 255, 256, 257, 5_000])
def test_an_order_has_each_number_once(length: int) -> None:
    """Whatever the length."""
    order = Permutation(length, 1)
    assert sorted(order[place] for place in range(length)) == list(range(length))


def test_an_order_stays_what_it_is() -> None:
    """On every machine, and with every version: a run goes on in it."""
    assert [Permutation(10, 0, "train", "", 0)[place] for place in range(10)] == [8, 9, 5, 3, 1, 2, 0, 7, 4, 6]
    assert Permutation(1_000_000, 0, "train", "", 3)[999_999] == 179_446


def test_orders_of_few_items_are_about_equally_frequent() -> None:
    """Each of the six orders of three items."""
    seen = Counter(tuple(Permutation(3, seed)[place] for place in range(3)) for seed in range(1_200))
    assert len(seen) == 6 and min(seen.values()) > 140


def test_an_order_of_a_million_is_not_held() -> None:
    """Any place of it is there at once."""
    started = time.monotonic()
    order = Permutation(1_000_000, 0)
    found = {order[place] for place in range(0, 1_000_000, 1_000)}
    assert len(found) == 1_000 and time.monotonic() - started < 2


def test_epochs_streams_feeds_and_seeds_have_orders_of_their_own() -> None:
    """And the same call has the same order."""
    items = list(range(50))
    first = drawn(only(items, epochs=2))
    assert first == drawn(only(items, epochs=2))
    assert [one[1] for one in first] == [0] * 50 + [1] * 50
    orders = [
        [one[3] for one in first[:50]],
        [one[3] for one in first[50:]],
        [one[3] for one in drawn(only(items, seed=1))],
        [one[3] for one in drawn(only(items, feed="g"))],
    ]
    assert len({tuple(order) for order in orders}) == 4 and all(sorted(order) == items for order in orders)


def test_without_a_seed_items_come_in_their_order() -> None:
    """Of several datasets, one after the other."""
    stream = only({"a": [1, 2], "b": [3]}, seed=None)
    assert drawn(stream) == [("a", 0, 0, 1), ("a", 0, 1, 2), ("b", 0, 0, 3)]
    assert stream.is_over and stream.position == Position(1, 0)


def test_several_datasets_are_drawn_as_one() -> None:
    """Mixed, each item with its place in its own dataset."""
    found = drawn(only({"a": [10, 11, 12], "b": [20, 21]}))
    assert sorted(found) == [("a", 0, 0, 10), ("a", 0, 1, 11), ("a", 0, 2, 12), ("b", 0, 0, 20), ("b", 0, 1, 21)]
    assert [one[0] for one in found] not in (["a"] * 3 + ["b"] * 2, ["b"] * 2 + ["a"] * 3)


# -- positions ---------------------------------------------------------------------------------------------------------


class Stateful:
    """An iterable that keeps its own state, as Hugging Face's do."""

    def __init__(self, count: int) -> None:
        self.count, self.at, self.reads = count, 0, 0

    def __iter__(self) -> Iterator[int]:
        while self.at < self.count:
            self.at += 1
            self.reads += 1
            yield self.at - 1
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Plain:
    """An iterable that is read from the start each time."""

    def __init__(self, count: int) -> None:
        self.count, self.epochs = count, list[int]()

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))


@pytest.mark.parametrize("make", [lambda: list(range(7)), lambda: Plain(7), lambda: Stateful(7)])
def test_a_stream_goes_on_from_any_position(make: Any) -> None:
    """With the items that would have followed."""
    whole = drawn(only(make(), epochs=3))
    assert len(whole) == 21
    for count in range(21):
        stream = only(make(), epochs=3)
        drawn(stream, count)
        again = only(make(), epochs=3)
        again.seek(stream.position, stream.state(), is_over=stream.is_over)
        assert whole[:count] + drawn(again) == whole, count


def test_a_state_saves_reading_from_the_start() -> None:
    """The iterable is asked only for what follows."""
    data = Stateful(1_000)
    stream = only(data, epochs=2)
    drawn(stream, 900)
    fresh = Stateful(1_000)
    again = only(fresh, epochs=2)
    again.seek(stream.position, stream.state(), is_over=False)
    assert drawn(again, 1)[0][2:] == (900, 900) and fresh.reads == 1


def test_an_iterator_goes_forward_only() -> None:
    """A new one is read up to the position; one that is past it says so."""
    stream = only(iter(range(10)))
    assert [one[3] for one in drawn(stream, 4)] == [0, 1, 2, 3]
    again = only(iter(range(10)))
    again.seek(stream.position, None, is_over=False)
    assert [one[3] for one in drawn(again)] == [4, 5, 6, 7, 8, 9]
    assert again.is_over
    with pytest.raises(rs.InvalidValueError, match="can be read again"):
        stream.seek(Position(0, 2), None, is_over=False)


def test_iterables_are_told_their_epoch() -> None:
    """If they ask for it."""
    data = Plain(2)
    assert [one[1:] for one in drawn(only(data, epochs=2))] == [(0, 0, 0), (0, 1, 1), (1, 0, 0), (1, 1, 1)]
    assert data.epochs == [0, 1]


def test_more_epochs_than_before() -> None:
    """A stream that was over goes on."""
    for data in ([1, 2], Plain(2)):
        stream = only(data, epochs=2)
        stream.seek(Position(1, 0), None, is_over=True)
        assert not stream.is_over and len(drawn(stream)) == 2


def test_epochs_without_end() -> None:
    """None; an iterable that is empty ends nevertheless."""
    assert len(drawn(only([1, 2, 3], epochs=None), 1_000)) == 1_000
    assert drawn(only(Plain(0), epochs=None)) == []


def test_nothing_is_read_that_is_not_asked_for() -> None:
    """Neither to begin, nor to go on."""

    class Reads(list[int]):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            self.reads += 1
            return super().__getitem__(index)

    data = Reads(range(100_000))
    stream = only(data)
    stream.seek(Position(0, 50_000), None, is_over=False)
    drawn(stream, 5)
    assert data.reads == 5


def test_a_draw_may_go_in_two_parts() -> None:
    """Each leads to where the next begins, and nothing is in both."""
    ends = [Position(0, 2), Position(0, 3), Position(1, 0)]
    draw = Draw("s", Position(0, 1), Position(1, 0), True, b"state", [{"n": 1}, {"n": 2}, {"n": 3}], ends=ends)
    draw.items, draw.skipped = [["e", 0, n] for n in range(3)], [["g", "why"]]
    first, second = draw.halves()
    assert (first.at, first.to, second.at, second.to) == (draw.at, ends[0], ends[0], draw.to)
    assert first.requests + second.requests == draw.requests and first.items + second.items == draw.items
    assert (first.over, first.state_after, second.over, second.state_after) == (False, None, True, b"state")
    assert first.skipped == draw.skipped and not second.skipped and second.arguments()["at"] == [0, 2]


# -- items that cannot be read -----------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_passed_over_with_the_reason() -> None:
    """An item that raises, and one that is None."""

    class Broken(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            if index == 1:
                raise OSError("no such file")
            return super().__getitem__(index)

    stream = only(Broken([1, 2, None, 4]), seed=None)
    found = [stream.next() for _ in range(4)]
    reasons = [one.why for one in found if one is not None]
    assert reasons == [None, "reading it raised OSError: no such file", "it is None", None]


def test_what_iterating_raises_is_no_end() -> None:
    """A generator that raised would else be taken for one that has given all."""

    def broken() -> Iterator[int]:
        yield 1
        raise OSError("the network is down")

    stream = only(broken())
    assert drawn(stream, 1)[0][3] == 1
    with pytest.raises(OSError, match="network"):
        stream.next()


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_a_fingerprint_tells_datasets_apart() -> None:
    """By length, by items, and by the name of the environment; not by the object."""
    items = [{"q": f"{n} + {n}", "a": 2 * n} for n in range(100)]
    prints = [
        only(items).fingerprint(), only(items[:-1]).fingerprint(), only({"b": items}).fingerprint(),
        only([{**item, "a": -1} for item in items]).fingerprint(), only({"a": items, "b": items}).fingerprint(),
    ]  # fmt: skip
    assert len({*prints}) == len(prints) and None not in prints
    assert only([dict(item) for item in items], seed=5, epochs=3).fingerprint() == prints[0]
    assert only(Plain(3)).fingerprint() is None


def test_items_without_a_form_of_their_own_have_no_fingerprint() -> None:
    """Rather than one that differs from process to process."""
    with open(__file__) as file:
        assert IndexedStream("f", "", [Indexed("f", [file], 1)], epochs=1, seed=0).fingerprint() is None


# -- what is a dataset -------------------------------------------------------------------------------------------------


class IterableDataset:
    """As torch's: it looks as if it could be indexed."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError

    def __iter__(self) -> Iterator[int]:
        return iter((1, 2))


def test_an_iterable_dataset_is_iterated() -> None:
    """Also where it has a length."""
    assert [one[3] for one in drawn(only(IterableDataset()))] == [1, 2]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (5, "a dataset"), ("text", "a dataset"), ({}, "at least one dataset"), ([], "at least one item"),
        ({"a": []}, r"data\['a'\]"), ({1, 2}, "sorted"), (None, "a dataset"), (print, "a dataset"),
        ({"a": iter([1]), "b": [1]}, "mix"),
    ],
)  # fmt: skip
def test_what_is_no_dataset_is_refused(data: Any, words: str) -> None:
    """By name and place."""
    with pytest.raises(rs.InvalidValueError, match=words):
        only(data)


def test_an_iterator_has_one_epoch() -> None:
    """Since it can be read once."""
    with pytest.raises(rs.InvalidValueError, match="epochs"):
        only(iter([1]), epochs=2)
    assert isinstance(only(iter([1])), IteratedStream)


def test_a_mix_has_a_stream_for_each_dataset() -> None:
    """With orders of their own."""
    data = {"a": list(range(30)), "b": list(range(30)), "c": Plain(3)}
    mix = {"a": 0.5, "b": 0.3, "c": 0.2}
    streams = streams_of("f", data, mix=mix, sampler=None, epochs=1, seed=0)
    assert [(stream.name, share) for stream, share in streams] == [("a", 0.5), ("b", 0.3), ("c", 0.2)]
    assert [one[3] for one in drawn(streams[0][0])] != [one[3] for one in drawn(streams[1][0])]


class Curriculum:
    """A sampler that keeps its state."""

    def __init__(self) -> None:
        self.level = 0

    def next(self) -> int | None:
        return self.level if self.level < 3 else None

    def observe(self, group_id: str, ending: str, rewards: list[float | None]) -> None:
        self.level += 1

    def state_dict(self) -> int:
        return self.level

    def load_state_dict(self, state: int) -> None:
        self.level = state


def test_a_sampler_gives_the_items() -> None:
    """Until it gives None, and from its state."""
    sampler = Curriculum()
    stream = only(None, sampler=sampler)
    first = stream.next()
    sampler.observe("g", "trained", [1.0])
    assert first is not None and drawn(stream, 2) == [("f", 0, 1, 1), ("f", 0, 2, 1)]
    fresh = Curriculum()
    again = only(None, sampler=fresh)
    again.seek(stream.position, stream.state(), is_over=False)
    assert fresh.level == 1 and drawn(again, 1) == [("f", 0, 3, 1)]
    fresh.level = 3
    assert again.next() is None and again.is_over
    with pytest.raises(rs.InvalidValueError, match="data"):
        only([1], sampler=sampler)
