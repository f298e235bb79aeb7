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

    def find(self, key: Key) -> dict[str, None]:
        """The rollouts under one key."""
        return self._ids.get(key, {})

    def add(self, rollout_id: str, key: Key) -> None:
        """Enter a rollout under a key."""
        self._ids.setdefault(key, {})[rollout_id] = None

    def image(self, numbers: dict[str, int]) -> list[Any]:
        """The keys, and the numbers of the rollouts under each."""
        return [(key, array("I", map(numbers.__getitem__, ids)).tobytes()) for key, ids in self._ids.items()]

    def restore(self, image: list[Any], ids: list[str]) -> None:
        """Fill empty indexes from an image."""
        for (name, value), numbers in image:
            key = (name, tuple(value) if isinstance(value, list) else value)
            self._ids[key] = dict.fromkeys(map(ids.__getitem__, array("I", numbers)))

    def remove(self, rollout_id: str, key: Key) -> None:
        """Take a rollout out from under a key."""
        ids = self._ids[key]
        del ids[rollout_id]
        if not ids:
            del self._ids[key]

    def counts(self, name: str) -> dict[Any, int]:
        """How many rollouts there are for each value of one index."""
        return {value: len(ids) for (index, value), ids in self._ids.items() if index == name}

    def check(self, expected: dict[str, set[Key]]) -> None:
        """Verify that exactly these keys are entered for exactly these rollouts."""
        actual: dict[str, set[Key]] = {}
        for key, ids in self._ids.items():
            for rollout_id in ids:
                actual.setdefault(rollout_id, set()).add(key)
        assert actual == expected, "the indexes differ from the rollouts"
