"""Repeated caller-given ids: the same content comes to the same rollout, other content of any kind is a conflict.

Two tables of values: pairs that say the same, and groups of which each two differ.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import itertools
import sys
import types
import uuid
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pydantic
import pytest

import raystore as rs
from raystore.core.payload import BY_BYTES, CANONICAL
from raystore.wire.codec import digest
from tests.conftest import MakeMemoryStore
from tests.contract.test_numbers import Tensor
from tests.helpers import AnyStore


@dataclasses.dataclass
class Point:
    x: object
    y: object = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: object


class Model(pydantic.BaseModel):
    x: object
    y: object = 0


class Open(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")

    if TYPE_CHECKING:

        def __init__(self, **values: Any) -> None: ...


class Plain:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class Slots:
    __slots__ = ("a", "b")

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)


class Kind(enum.Enum):
    A = 1
    B = 2


class Right(enum.Flag):
    READ = 1
    WRITE = 2


class MyDict(dict[Any, Any]):
    pass


Pair = collections.namedtuple("Pair", "a b")


def add(a: Any, b: Any) -> Any:
    return a + b


def subtract(a: Any, b: Any) -> Any:
    return a - b


def adder(number: int) -> Callable[..., Any]:
    return lambda x: x + number


def endless(*items: Any) -> list[Any]:
    """A list that holds itself."""
    made = list(items)
    made.append(made)
    return made


def twins(shared: bool) -> list[list[int]]:
    """Two of the same, as one object or as two."""
    item = [1, 2]
    return [item, item] if shared else [item, [1, 2]]


def deep(leaf: Any, levels: int = 100) -> Any:
    for _ in range(levels):
        leaf = [leaf]
    return leaf


def tangled() -> list[Any]:
    """A small value of which a walk would visit very much if it forgot where it has been."""
    made: list[Any] = [0]
    for _ in range(200):
        made = [made, made]
    return made


SAME = {
    "keys of a dict": ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}),
    "a list of dicts": ([{"a": 1, "b": 2}], [{"b": 2, "a": 1}]),
    "a tuple with a dict": (({"a": 1, "b": (2,)},), ({"b": (2,), "a": 1},)),
    "keys of several kinds": ({1: "a", "1": "b", None: "c"}, {None: "c", "1": "b", 1: "a"}),
    "sets": ({f"name {n}" for n in range(100)}, {f"name {99 - n}" for n in range(100)}),
    "frozen sets": (frozenset({(1, 2), (3, 4)}), frozenset({(3, 4), (1, 2)})),
    "NaN": ([float("nan")], [float("nan")]),
    "keys of a dict's subclass": (MyDict(a=1, b=2), MyDict(b=2, a=1)),
    "ordered dicts": (collections.OrderedDict(a=1, b=2), collections.OrderedDict(b=2, a=1)),
    "default dicts": (collections.defaultdict(list, a=[1], b=[]), collections.defaultdict(list, b=[], a=[1])),
    "counters": (collections.Counter("abb"), collections.Counter("bba")),
    "arrays of numpy": (np.arange(6).reshape(2, 3), np.array([[0, 1, 2], [3, 4, 5]])),
    "arrays in another order": (np.asfortranarray(np.ones((2, 3))), np.ones((2, 3))),
    "arrays of objects": (np.array([{"a": 1, "b": 2}], object), np.array([{"b": 2, "a": 1}], object)),
    "numbers of numpy": (np.float32(0.1), np.float32(0.1)),
    "dataclasses": (Point({"a": 1, "b": 2}), Point(y=0, x={"b": 2, "a": 1})),
    "models": (Model(x={1, 2}), Model(y=0, x={2, 1})),
    "open models": (Open(a=1, b=2), Open(b=2, a=1)),
    "objects": (Plain(a=1, b=[2]), Plain(b=[2], a=1)),
    "objects with slots": (Slots(a=1, b=2), Slots(b=2, a=1)),
    "enums": ({"kind": Kind.A, "right": Right.READ | Right.WRITE}, {"right": Right.WRITE | Right.READ, "kind": Kind.A}),
    "cycles": (endless({"a": 1, "b": 2}), endless({"b": 2, "a": 1})),
    "shared parts": (twins(True), twins(False)),
    "deep ones": (deep({"a": 1, "b": 2}), deep({"b": 2, "a": 1})),
    "tangled ones": (tangled(), tangled()),
    "functions": ({"f": add, "g": adder(1)}, {"g": adder(1), "f": add}),
    "partials": (functools.partial(add, b=1), functools.partial(add, b=1)),
    "classes": ([Point, dict[str, int]], [Point, dict[str, int]]),
    "large integers": ({"a": 1 << 80, "b": 1}, {"b": 1, "a": 1 << 80}),
    "lone surrogates": ({"a": "\ud800", "b": 1}, {"b": 1, "a": "\ud800"}),
    "others": (
        [datetime.datetime(2026, 1, 1), decimal.Decimal("1.0"), uuid.UUID(int=1), Path("x"), Pair(1, {"a": 1, "b": 2})],
        [datetime.datetime(2026, 1, 1), decimal.Decimal("1.0"), uuid.UUID(int=1), Path("x"), Pair(1, {"b": 2, "a": 1})],
    ),
}

OTHER: dict[str, list[Any]] = {
    "kinds of numbers": [1, 1.0, True, 0, 0.0, False, -1, None, "1", b"1", np.int64(1), np.int32(1), np.float64(1), 1j],
    "kinds of sequences": [[1, 2], (1, 2), {1, 2}, frozenset({1, 2}), array("i", [1, 2]), np.array([1, 2]), Pair(1, 2)],
    "empty ones": [[], (), {}, set(), "", b"", bytearray(), None, MyDict()],
    "bounds of parts": [["ab", "c"], ["a", "bc"], ["abc"], [["ab"], "c"], ["ab", ["c"]], [["ab", "c"]]],
    "dicts": [{"a": 1}, {"a": 2}, {"b": 1}, {"a": 1, "b": 1}, {1: "a"}, {"a": {"a": 1}}, MyDict(a=1)],
    "sets": [{1, 2}, {1, 3}, {1}, {"1", "2"}],
    "integers": [1, -1, 1 << 64, 1 << 80, -(1 << 80), 0],
    "floats": [0.1, 0.2, float("inf"), float("-inf"), float("nan"), 0.0, -0.0],
    "texts": ["a", "b", "\ud800", "\ud801", "a\0"],
    "packed": [array("i", [1]), array("i", [2]), array("q", [1]), array("f", [1])],
    "arrays": [
        np.arange(6), np.arange(6).reshape(2, 3), np.arange(6).reshape(3, 2), np.arange(6.0), np.arange(7),
        np.arange(6, dtype="int32"), np.arange(6, dtype=">i8"), np.zeros(1, [("a", "i4")]), np.zeros(1, [("b", "i4")]),
        np.array([1], object), np.array([2], object), np.datetime64("2026-01-01"), np.datetime64("2026-01-02"),
    ],
    "fields": [Point(1), Point(2), Point(1, 1), Slotted(1), Slotted(2), Model(x=1), Model(x=2), Model(x=1, y=1),
               Open(x=1)],
    "objects": [Plain(a=1), Plain(a=2), Plain(b=1), Plain(), Slots(a=1), Slots(a=2), Slots(b=1)],
    "enums": [Kind.A, Kind.B, Right.READ, Right.READ | Right.WRITE, Kind, Right, 1],
    "cycles": [endless(1), endless(2), endless(), [endless()], endless(1, 2)],
    "functions": [add, subtract, adder(1), adder(2), lambda x: x, lambda x: x + 1, functools.partial(add, 1), len, max],
    "classes": [Point, Slotted, dict, dict[str, int], dict[str, str], type],
    "times": [datetime.date(2026, 1, 1), datetime.date(2026, 1, 2), datetime.timedelta(1), datetime.timedelta(2)],
    "others": [decimal.Decimal(1), decimal.Decimal(2), Path("a"), Path("b"), uuid.UUID(int=1), uuid.UUID(int=2)],
    "errors": [ValueError("a"), ValueError("b"), TypeError("a")],
    "queues": [collections.deque([1]), collections.deque([2]), collections.deque([1], maxlen=1)],
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
async def test_the_same_content(make_memory_store: MakeMemoryStore, name: str) -> None:
    """As input and within metadata, in any order of keys: one rollout."""
    one, other = SAME[name]
    store = make_memory_store()
    for make in (lambda value: {"input": value}, lambda value: {"input": 0, "metadata": {"value": value}}):
        rollout_id = f"{len((await store.query_rollouts()).items)}"
        first = await store.enqueue_rollout(**make(one), rollout_id=rollout_id)
        again = await store.enqueue_rollout(**make(other), rollout_id=rollout_id)
        assert again.rollout_id == first.rollout_id
    assert (await store.query_rollouts()).total == 2


@pytest.mark.parametrize("name", OTHER)
async def test_other_content(make_memory_store: MakeMemoryStore, name: str) -> None:
    """Each two differ, and each equals itself; the conflict names what differs and changes nothing."""
    store = make_memory_store()
    for number, value in enumerate(OTHER[name]):
        await store.enqueue_rollout(value, metadata={"value": value}, rollout_id=f"{number}")
    for (number, one), (_, other) in itertools.product(enumerate(OTHER[name]), repeat=2):
        if one is other:
            await store.enqueue_rollout(other, metadata={"value": other}, rollout_id=f"{number}")
            continue
        with pytest.raises(rs.ConflictError, match=rf"{number} exists already with other content \(input differ\)"):
            await store.enqueue_rollout(other, metadata={"value": one}, rollout_id=f"{number}")
        with pytest.raises(rs.ConflictError, match=r"\(metadata differ\)"):
            await store.enqueue_rollout(one, metadata={"value": other}, rollout_id=f"{number}")
    assert (await store.query_rollouts()).total == len(OTHER[name])


async def test_on_every_store(store: AnyStore) -> None:
    """Also in bulk, after the input was changed, and beside what is no value of the user's."""
    request = rs.EnqueueRolloutRequest(input={"a": {1, 2}, "b": Point(1)}, rollout_id="mine", tags={"t": 1, "u": 2})
    (first,) = await store.enqueue_many_rollouts([request])
    await store.update_rollout("mine", input="changed")
    again = await store.enqueue_rollout({"b": Point(1), "a": {2, 1}}, rollout_id="mine", tags={"u": 2, "t": 1})
    assert again.rollout_id == first.rollout_id and again.input == "changed"
    for others in ({"input": "changed"}, {"input": request.input, "mode": "val"}):
        with pytest.raises(rs.ConflictError):
            await store.enqueue_rollout(**others, rollout_id="mine", tags={"u": 2, "t": 1})


async def test_after_a_restart(make_memory_store: MakeMemoryStore, tmp_path: Path) -> None:
    """A journal and its snapshot keep what a repetition is compared with."""
    journal = tmp_path / "journal"
    store = make_memory_store(journal=journal)
    await store.enqueue_rollout({"a": {1, 2}, "b": 1}, rollout_id="mine")
    store.close()
    store = make_memory_store(journal=journal)
    assert (await store.enqueue_rollout({"b": 1, "a": {2, 1}}, rollout_id="mine")).input == {"a": {1, 2}, "b": 1}
    with pytest.raises(rs.ConflictError):
        await store.enqueue_rollout({"b": 1, "a": {2, 3}}, rollout_id="mine")


class Unformed:
    """Only pickling itself can take this apart."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce_ex__(self, protocol: Any) -> Any:
        if protocol == 4:
            raise TypeError("no form")
        return Unformed, (self.number,)


async def test_where_no_form_can_be_made_the_bytes_decide(make_memory_store: MakeMemoryStore) -> None:
    """Equal bytes are the same content, others are not."""
    store = make_memory_store()
    assert digest(Unformed(1), b"\x02x")[0] == BY_BYTES and digest([1], b"\x01x")[0] == CANONICAL
    await store.enqueue_rollout(Unformed(1), rollout_id="mine")
    assert (await store.enqueue_rollout(Unformed(1), rollout_id="mine")).input.number == 1
    with pytest.raises(rs.ConflictError):
        await store.enqueue_rollout(Unformed(2), rollout_id="mine")


def test_a_cycle_of_many_parts_is_bounded() -> None:
    """What refers back all over takes no exponential time."""
    nodes: list[list[Any]] = [[] for _ in range(20)]
    for node in nodes:
        node.extend(nodes)
    assert digest(nodes, b"\x02x")[0] == BY_BYTES


def test_tensors_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """By dtype, shape and bytes; torch itself is too large to be installed for this, so something stands in for it."""

    class Tensor:
        def __init__(self, values: Any, dtype: str = "float32") -> None:
            self.values, self.dtype = np.array(values, dtype), dtype
            self.shape = self.values.shape

        def detach(self) -> Any:
            return self

        cpu = contiguous = detach

        def reshape(self, _: int) -> Tensor:
            return Tensor(self.values.reshape(-1), self.dtype)

        def view(self, _: str) -> Tensor:
            return Tensor(self.values.view("uint8"), "uint8")

        def numpy(self) -> Any:
            return self.values

        def __reduce_ex__(self, protocol: Any) -> Any:
            raise TypeError("goes by its bytes")

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(Tensor=Tensor, uint8="uint8"))
    made = [Tensor([1, 2]), Tensor([1, 3]), Tensor([[1, 2]]), Tensor([1, 2], "float64"), Tensor(1.0)]
    digests = [digest({"tensor": tensor}, b"\x02") for tensor in made]
    assert len(set(digests)) == len(made) and all(found[0] == CANONICAL for found in digests)
    assert digest({"tensor": Tensor([1, 2])}, b"\x02") == digests[0]
