"""How much code one operation runs through: functions and modules of raystore, client and store's process together.

Run `python -m benchmarks.paths`; `--names` lists the functions. Each operation is alone, on a store without a journal.
The store's process is a thread here, which takes and gives the bytes of a session, so that both sides are counted.
Not here: what Ray runs of its own, and how long anything takes.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import raystore as rs
from raystore.types.options import StoreConfig
from tests.service.near import NearStore

PACKAGE = str(Path(rs.__file__).parent)
IS_NO_FUNCTION = ("<lambda>", "<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>")
CLIENT = threading.main_thread()
TIMES = 5  #: that each operation is watched; the shortest counts, as nothing else runs at the same time in it


class Calls:
    """The calls that are made while it watches, each with its module, its function, and whether the client made it."""

    def __init__(self) -> None:
        self.is_watching = False
        self.seen: list[tuple[str, str, bool]] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if self.is_watching and event == "call" and code.co_filename.startswith(PACKAGE):
            module = code.co_filename.removeprefix(PACKAGE).removesuffix(".py").strip("/").replace("/", ".")
            if not code.co_qualname.endswith(IS_NO_FUNCTION):
                self.seen.append((module, code.co_qualname, threading.current_thread() is CLIENT))

    async def of(self, operation: Callable[[], Awaitable[Any]], number: int) -> list[tuple[str, str, bool]]:
        """What an operation calls until its answer is there."""
        # What follows earlier operations, as the acknowledgement of a claim, is over; and not in step with timers.
        await asyncio.sleep(1 + 0.17 * number)
        self.seen.clear()
        self.is_watching = True
        await operation()
        self.is_watching = False
        return list(self.seen)


def connect(near: NearStore) -> rs.RayLightningStore:
    """A client as `RayLightningStore` is one, of a store in another thread instead of an actor."""
    config = StoreConfig()
    near._actor_id = SimpleNamespace(binary=lambda: b"near")  # type: ignore[attr-defined]  # as a handle of Ray's has one
    known = {"name": "near", "namespace": "near", "epoch": near.service.epoch, "config": config}
    store = rs.RayLightningStore.__new__(rs.RayLightningStore)
    store._attach(near, known | {"limits": config.all_limits(), "objects": None}, owns=False)
    return store


async def main() -> None:
    """Print the table."""
    calls = Calls()
    threading.setprofile(calls)
    near = NearStore()
    store = connect(near)
    sys.setprofile(calls)
    await store.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input=n) for n in range(TIMES + 1)])
    claimed = await store.dequeue_rollout("w")
    assert claimed is not None
    ids: dict[str, Any] = {"rollout_id": claimed.rollout_id, "attempt_id": claimed.attempt.attempt_id}
    spans = [rs.Span.from_attributes(attributes={"k": n}, sequence_id=n, **ids) for n in range(TIMES + 1)]
    await store.add_span(spans.pop())
    operations: dict[str, Callable[[], Awaitable[Any]]] = {
        "add_span": lambda: store.add_span(spans.pop()),
        "dequeue_rollout": lambda: store.dequeue_rollout("w"),
    }
    print("| operation | functions | modules | of the client | of the store | calls |")
    print("|---|---|---|---|---|---|")
    for name, operation in operations.items():
        seen = min([await calls.of(operation, number) for number in range(TIMES)], key=len)
        functions = dict.fromkeys(call[:2] for call in seen)
        sides = [len({call[:2] for call in seen if call[2] is is_client}) for is_client in (True, False)]
        modules = {module for module, _ in functions}
        print(f"| {name} | {len(functions)} | {len(modules)} | {sides[0]} | {sides[1]} | {len(seen)} |")
        if "--names" in sys.argv:
            print(*(f"    {module} {function}" for module, function in functions), sep="\n")
    sys.setprofile(None)
    store.close()
    near.close()


if __name__ == "__main__":
    asyncio.run(main())
