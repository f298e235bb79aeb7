"""Which rollouts have this status, group, tag, queue or worker: kept with every change, so that a query need not scan.

Each index maps a value to rollout ids. Order does not matter here; queries restore insertion order.
Not here: what else a query filters by (`query`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

from raystore.core.records import Attempt, Rollout

Key = tuple[str, Any]

PACKED = 20_000  #: an index that is longer is made at the start, since that would hold up whoever asks


def keys_of(rollout: Rollout, attempt: Attempt | None) -> Iterator[Key]:
    """The index keys under which a rollout can be found."""
    yield "status", rollout.status
    yield "queue", rollout.queue
    if rollout.group_id is not None:
        yield "group", rollout.group_id
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

    def add(self, rollout_id: str, key: Key) -> None:
        """Enter a rollout under a key."""
        if key in self._packed:
            self._unpack(key)
        self._ids.setdefault(key, {})[rollout_id] = None

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

    def remove(self, rollout_id: str, key: Key) -> None:
        """Take a rollout out from under a key."""
        if key in self._packed:
            self._unpack(key)
        ids = self._ids[key]
        del ids[rollout_id]
        if not ids:
            del self._ids[key]

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
