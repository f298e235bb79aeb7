"""A script with one of everything that a script may define; puts it into a store, or checks what comes out of one."""

from __future__ import annotations

import abc
import collections
import dataclasses
import enum
import functools
import multiprocessing
import pickle
import sys
import typing
from typing import Any

import pydantic

import raystore as rs
from raystore.values import pickler


class Kind(enum.Enum):
    MATH = 1
    CODE = "code"

    def shout(self) -> str:
        return self.name


class Level(enum.IntEnum):
    LOW = 1


class Right(enum.Flag):
    READ = 1
    WRITE = 2


class Base:
    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.number == self.number

    __hash__ = None  # type: ignore[assignment]

    def things(self) -> Any:
        return Base, helper()


class Sub(Base):
    class Inner:
        x = 1


@dataclasses.dataclass
class Point:
    x: int
    kind: Kind = Kind.MATH


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: int


class Pair(typing.NamedTuple):
    a: int
    b: Kind


Couple = collections.namedtuple("Couple", "a b")
T = typing.TypeVar("T")


class Box(typing.Generic[T]):
    def __init__(self, item: int) -> None:
        self.item = item


class Model(pydantic.BaseModel):
    kind: Kind
    point: Point


class Holder(pydantic.BaseModel, typing.Generic[T]):
    value: T


class Abstract(abc.ABC):
    @abc.abstractmethod
    def own_class(self) -> type[Abstract]: ...


class Concrete(Abstract):
    def own_class(self) -> type[Concrete]:
        return Concrete


class Node:
    def __init__(self, parent: Node | None = None) -> None:
        self.parent = parent
        self.children: list[Node] = []


class Trouble(Exception):
    pass


class Meta(type):
    def __eq__(cls, other: object) -> bool:  # so that its classes cannot be told apart by `==`
        return True

    __hash__ = type.__hash__


class Odd(metaclass=Meta):
    pass


def helper() -> Kind:
    return Kind.MATH


def noted(function: Any) -> Any:
    @functools.wraps(function)
    def inner(*arguments: Any) -> Any:
        return function(*arguments)

    return inner


@noted
def decorated(x: Any) -> Any:
    return Kind.CODE, x


def agent(task: Any, ctx: rs.Context) -> float:
    """Knows its tasks by their class; on Ray it also hands on what a task brought."""
    if isinstance(task, dict):
        check(task)
        rs.connect("zoo").sync.enqueue_rollout(task | {"mine": Kind.CODE}, queue="back")
    return float(isinstance(task, dict) or (isinstance(task, Kind) and task is Kind(task.value)))


def through_runners() -> None:
    """By way of a pool on Ray, with agents in its actors and in processes of their own."""
    with rs.start("zoo") as store:
        for isolation in ("actor", "process"):
            task = values() if isolation == "actor" else Kind.MATH
            made = store.sync.enqueue_rollout(task, rollout_id=isolation)
            with rs.RunnerPool(store, agent, size=1, isolation=isolation):
                done = store.sync.wait_for_rollout(made.rollout_id, timeout=60)
            assert done is not None and done.reward == 1.0, store.sync.get_latest_attempt(made.rollout_id)
        claimed = store.sync.dequeue_rollout(queues=["back"])
        assert claimed is not None
        back = claimed.input
        assert back.pop("mine") is Kind.CODE
        print(check(back), "values came back")


SAME = ["kind", "code", "level", "inner", "helper", "decorated"]
EQUAL = [
    "right",
    "alias",
    "base",
    "sub",
    "point",
    "slotted",
    "pair",
    "couple",
    "model",
    "holder",
    "held",
    "all",
    "deep",
]


def values() -> dict[str, Any]:
    """By name."""
    node = Node()
    node.children.append(Node(node))
    return {
        "kind": Kind.MATH, "code": Kind.CODE, "level": Level.LOW, "right": Right.READ | Right.WRITE,
        "base": Base(1), "sub": Sub(2), "inner": Sub.Inner, "nested": Sub.Inner(), "point": Point(1),
        "slotted": Slotted(3), "pair": Pair(1, Kind.CODE), "couple": Couple(1, 2), "box": Box(3), "alias": Box[int],
        "model": Model(kind=Kind.MATH, point=Point(2)), "holder": Holder[int](value=3),
        "held": Holder[Kind](value=Kind.CODE), "concrete": Concrete(), "node": node, "trouble": Trouble("x", Kind.MATH),
        "helper": helper, "decorated": decorated, "anonymous": lambda: Kind.MATH, "part": functools.partial(helper),
        "bound": Base(4).things, "all": [Kind, Point, Base, Sub, Model, Pair, Concrete, Odd], "odd": Odd(),
        "deep": {Kind.MATH: [Point(5), (Kind.CODE, {Slotted(1)})]},
    }  # fmt: skip


def check(found: Any) -> int:
    """That these are values of this very script."""
    for name, expected in values().items():
        if name not in found:
            continue
        value = found[name]
        assert type(value) is type(expected), (name, type(value), type(expected))
        assert name not in SAME or value is expected, name
        assert name not in EQUAL or value == expected, (name, value, expected)
    if "all" in found:
        assert all(one is other for one, other in zip(found["all"], values()["all"], strict=True))
        assert isinstance(found["sub"], Base) and isinstance(found["concrete"], Abstract)
        assert found["concrete"].own_class() is Concrete and found["bound"]() == (Base, Kind.MATH)
        assert found["anonymous"]() is Kind.MATH and found["part"]() is Kind.MATH
        assert found["node"].children[0].parent is found["node"] and found["trouble"].args == ("x", Kind.MATH)
    return len(found)


def in_a_spawned_process(pipe: Any) -> None:
    """What came is checked, and the same goes back."""
    check(pickle.loads(pipe.recv_bytes()))
    pipe.send_bytes(pickler.dumps(values()))


def contents(store: rs.InMemoryLightningStore) -> dict[str, Any]:
    return {name: value for rollout in store.sync.query_rollouts() for name, value in rollout.input.items()}


if __name__ == "__main__":
    journal, what = sys.argv[1:]
    if what == "runners":
        through_runners()
        raise SystemExit
    with rs.InMemoryLightningStore(journal=journal) as store:
        if what == "put":
            for name, value in values().items():
                store.sync.enqueue_rollout({name: value})
        if what == "spawn":
            ours, theirs = multiprocessing.Pipe()
            process = multiprocessing.get_context("spawn").Process(target=in_a_spawned_process, args=(theirs,))
            process.start()
            ours.send_bytes(pickler.dumps(contents(store)))
            check(pickle.loads(ours.recv_bytes()))
            process.join()
        with open(journal + ".agent", "wb") as file:
            file.write(pickler.dumps(agent))
        print(check(contents(store)), "values are those of the script")
