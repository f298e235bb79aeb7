"""Rollouts by the instant at which they ended: the oldest first, in whatever order they came here.

One that is discarded leaves its place behind, which is skipped when met.
Not here: which rollouts these are (`wanted`), what becomes of them (`retention`).
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heappush


class Ages:
    """Rollouts, each with the instant at which it ended."""

    def __init__(self) -> None:
        self._ended: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._ended)

    def __contains__(self, rollout_id: str) -> bool:
        return rollout_id in self._ended

    def add(self, rollout_id: str, ended: float) -> None:
        """Enter a rollout."""
        if self._ended.get(rollout_id) == ended:
            return
        self._ended[rollout_id] = ended
        heappush(self._heap, (ended, rollout_id))
        if len(self._heap) > 256 and len(self._heap) > 4 * len(self._ended):  # mostly places without meaning
            self._heap = [(ended, rollout_id) for rollout_id, ended in self._ended.items()]
            heapify(self._heap)

    def discard(self, rollout_id: str) -> None:
        """Forget a rollout, if it is here."""
        self._ended.pop(rollout_id, None)

    def oldest(self) -> tuple[float, str] | None:
        """When the rollout that ended first did so, and which it is."""
        while self._heap:
            ended, rollout_id = self._heap[0]
            if self._ended.get(rollout_id) == ended:
                return ended, rollout_id
            heappop(self._heap)
        return None

    def image(self) -> list[tuple[str, float]]:
        """All of them."""
        return list(self._ended.items())

    def restore(self, image: Iterable[tuple[str, float]]) -> None:
        """Fill with what an image has."""
        for rollout_id, ended in image:
            self.add(rollout_id, ended)
