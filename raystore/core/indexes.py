"""Which rollouts have this status, group, tag, queue or worker: kept with every change, so that a query need not scan.

Each index maps a value to rollout ids. Order does not matter here; queries restore insertion order.
Not here: what else a query filters by (`query`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
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

    def enter_all(self, entries: Iterable[tuple[str, Rollout, Attempt | None]]) -> None:
        """Enter many rollouts under all their keys."""
        found: defaultdict[Key, dict[str, None]] = defaultdict(dict)
        for rollout_id, rollout, attempt in entries:  # the keys of `keys_of`, at a third of its cost
            found["status", rollout.status][rollout_id] = None
            found["queue", rollout.queue][rollout_id] = None
            if rollout.group_id is not None:
                found["group", rollout.group_id][rollout_id] = None
            for name, value in rollout.tags.items():
                found["tag", (name, value)][rollout_id] = None
            if attempt is not None and attempt.worker_id is not None:
                found["worker", attempt.worker_id][rollout_id] = None
        for key, ids in found.items():
            self._ids.setdefault(key, {}).update(ids)

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
