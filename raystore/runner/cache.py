"""The resources that a runner's agents use, fetched once for all that run at the same time or soon after another.

A version stays while an agent uses it and a moment longer, so that a busy runner asks once; then it goes, since
weights that nobody uses must be able to leave the object store. A version that a newer one of the same id has replaced
goes with its last user.
Not here: the objects themselves, which an agent gets by `ObjectResource.get`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from raystore.client.client import StoreClient
from raystore.errors import ResourcesNotFoundError
from raystore.types import AttemptedRollout

IDLE_SECONDS = 1.0  #: that a version stays after its last user

Key = tuple[str, int]  # id and version


class _Cached:
    """One version: its resources by name, and how many use it."""

    __slots__ = ("resources", "users", "uses")

    def __init__(self, resources: dict[str, Any]) -> None:
        self.resources = resources
        self.users = 0
        self.uses = 0  # ever, to tell whether it was used since


class ResourceCache:
    """The resources of one runner, on its event loop."""

    def __init__(self, store: StoreClient) -> None:
        self._store = store
        self._cached: dict[Key, _Cached] = {}

    def __len__(self) -> int:
        return len(self._cached)

    async def take(self, rollout: AttemptedRollout) -> dict[str, Any]:
        """The named resources of the version that was newest at the claim; to be given back."""
        resources_id, version = rollout.resources_id, rollout.attempt.resources_version
        if resources_id is None:
            return {}
        if version is None:
            raise ResourcesNotFoundError(resources_id)
        key = (resources_id, version)
        if key not in self._cached:
            update = await self._store.get_resources_by_id(resources_id, version)
            if update is None:
                raise ResourcesNotFoundError(resources_id)
            self._cached.setdefault(key, _Cached(dict(update.resources)))
        cached = self._cached[key]
        cached.users += 1
        cached.uses += 1
        for other, unused in list(self._cached.items()):
            if other[0] == resources_id and other[1] < version and not unused.users:
                del self._cached[other]
        return cached.resources

    def give_back(self, rollout: AttemptedRollout) -> None:
        """The agent of a rollout, whose resources were taken, uses them no longer."""
        resources_id, version = rollout.resources_id, rollout.attempt.resources_version
        if resources_id is None or version is None:
            return
        key = (resources_id, version)
        cached = self._cached[key]
        cached.users -= 1
        if cached.users:
            return
        if any(other[0] == resources_id and other[1] > version for other in self._cached):
            del self._cached[key]
        else:
            asyncio.get_running_loop().call_later(IDLE_SECONDS, self._drop, key, cached.uses)

    def _drop(self, key: Key, uses: int) -> None:
        """Forget a version, unless somebody has used it since."""
        cached = self._cached.get(key)
        if cached is not None and not cached.users and cached.uses == uses:
            del self._cached[key]
