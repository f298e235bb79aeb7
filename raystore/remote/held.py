"""The objects that a process has published and holds on to, so that they outlive the store's process.

Ray frees an object that nobody refers to, and what the store refers to dies with its process. So whoever published an
object refers to it, too, until the store says that nobody needs it any more, and tells each process of the store anew.
Not here: objects in the journal (`raystore.values.objects`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

from raystore.core.payload import PLAIN, Payload
from raystore.remote.batching import Operation

EARLY_KEPT = 1_000  #: words of the store that overtook the answer they are about

Version = tuple[str, int]  # id and version
NOTHING = bytes([PLAIN, 0xC0])  # the encoded None


class HeldObjects:
    """The references of one session, by version of resources; may be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[Version, tuple[Any, ...]] = {}
        self._early: dict[Version, None] = {}

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, key: Version, references: tuple[Any, ...]) -> None:
        """Hold on to the objects of a version that was published."""
        with self._lock:
            if key not in self._early:
                self._held[key] = references
            self._early.pop(key, None)

    def drop(self, keys: Iterable[Sequence[Any]]) -> None:
        """Nobody needs the objects of these versions any more."""
        with self._lock:
            for resources_id, version in keys:
                key = (resources_id, int(version))
                if self._held.pop(key, None) is None:
                    self._early[key] = None
                    if len(self._early) > EARLY_KEPT:
                        del self._early[next(iter(self._early))]

    def versions(self) -> list[tuple[str, int, Payload]]:
        """All of them, as they are told to the store."""
        with self._lock:
            return [(*key, Payload(NOTHING, references)) for key, references in self._held.items()]

    def clear(self) -> None:
        """The store is gone."""
        with self._lock:
            self._held.clear()


class HoldAgain(Operation):
    """Tells the store which objects this process has; the answer names those that it may let go of."""

    __slots__ = ("_held",)

    def __init__(self, held: HeldObjects) -> None:
        Operation.__init__(self, "hold_objects", {"versions": held.versions()}, awaited=False)
        self._held = held

    def put(self, answer: Any, error: Exception | None) -> None:
        Operation.put(self, answer, error)
        if error is None:
            self._held.drop(answer)
