"""Resources by id and version, which of them is the latest, and which may be freed.

A version is immutable. Of each id the newest versions stay, and those that somebody refers to: an attempt that has not
ended. An older version that holds an object is *superseded*: once nobody refers to it, its value is freed at once,
since weights are large; its record stays and says so.
Not here: who refers to a version (`attempts` counts references up and down).
"""

from __future__ import annotations

from typing import Any

from raystore.core.payload import size_of
from raystore.core.records import Resources
from raystore.errors import PayloadLostError, ResourcesNotFoundError

VERSIONS_KEPT = 8  #: newest versions of each id
OBJECT_IDS_WARNED = 16  #: more ids than this that hold objects are likely a leak
RECORD_OVERHEAD_BYTES = 500


class ResourceTable:
    """All resources of a store."""

    def __init__(self, keep: int | None) -> None:
        self.keep = keep
        self._versions: dict[str, dict[int, Resources]] = {}
        self._references: dict[tuple[str, int], int] = {}
        self.latest_id: str | None = None
        self.policy_version: int | None = None
        self.bytes = 0
        self._object_ids: set[str] = set()

    def __len__(self) -> int:
        return len(self._versions)

    def __contains__(self, resources_id: object) -> bool:
        return resources_id in self._versions

    @property
    def object_ids(self) -> int:
        """How many ids hold an object in their newest version."""
        return len(self._object_ids)

    def publish(
        self, resources_id: str, payload: Any, *, now: float, policy_version: int | None, holds_objects: bool
    ) -> Resources:
        """Store a new version and make its id the latest."""
        versions = self._versions.setdefault(resources_id, {})
        newest = versions[max(versions)] if versions else None
        made = Resources(
            resources_id=resources_id,
            version=newest.version + 1 if newest else 1,
            create_time=newest.create_time if newest else now,
            update_time=now,
            policy_version=policy_version,
            resources=payload,
            holds_objects=holds_objects,
        )
        versions[made.version] = made
        self.bytes += size_of(payload) + RECORD_OVERHEAD_BYTES
        self.latest_id = resources_id
        self.policy_version = policy_version
        if newest is not None:
            self._thin(resources_id)
        (self._object_ids.add if holds_objects else self._object_ids.discard)(resources_id)
        self._drop_old_ids()
        return made

    def newest(self, resources_id: str | None) -> Resources | None:
        """The newest version of an id, whose value may not be freed."""
        versions = self._versions.get(resources_id) if resources_id is not None else None
        return versions[max(versions)] if versions else None

    def get(self, resources_id: str, version: int | None) -> Resources | None:
        """One version (None: the newest), None if there is no such; a freed value raises."""
        if version is None:
            return self.newest(resources_id)
        found = self._versions.get(resources_id, {}).get(version)
        if found is not None and found.resources is None:
            raise PayloadLostError(
                f"resources {resources_id} version {version}",
                f"version {max(self._versions[resources_id])} replaced it and no attempt used it any more, "
                "so the object was freed. Read the newest version.",
            )
        return found

    def latest(self) -> Resources | None:
        """What was published last."""
        return self.newest(self.latest_id)

    def all_newest(self) -> list[Resources]:
        """The newest version of each id, in the order in which the ids came."""
        return [versions[max(versions)] for versions in self._versions.values()]

    # -- references and freeing ----------------------------------------------------------------------------------

    def refer(self, resources_id: str | None, version: int | None, change: int) -> None:
        """Count a reference up (1) or down (-1); the last one that goes may free the version."""
        if resources_id is None or version is None:
            return
        key = (resources_id, version)
        count = self._references.get(key, 0) + change
        if count > 0:
            self._references[key] = count
            return
        self._references.pop(key, None)
        if resources_id in self._versions:
            self._thin(resources_id)
            self._drop_old_ids()

    def _thin(self, resources_id: str) -> None:
        versions = self._versions[resources_id]
        newest = max(versions)
        kept = sorted(versions)[-VERSIONS_KEPT:]
        for version, held in list(versions.items()):
            if version == newest or (resources_id, version) in self._references:
                continue
            if version not in kept:
                self._free(held)
                del versions[version]
            elif held.holds_objects and held.resources is not None:
                self.bytes -= size_of(held.resources)
                versions[version] = held.evolve(resources=None)

    def _free(self, held: Resources) -> None:
        self.bytes -= size_of(held.resources) + RECORD_OVERHEAD_BYTES

    def _referred(self, resources_id: str) -> bool:
        return any((resources_id, version) in self._references for version in self._versions[resources_id])

    def _drop_old_ids(self) -> None:
        if self.keep is None or len(self._versions) <= self.keep:
            return
        by_age = sorted(self._versions, key=lambda key: self.all_versions(key)[-1].update_time)
        for resources_id in by_age[: len(by_age) - self.keep]:
            if resources_id != self.latest_id and not self._referred(resources_id):
                self._drop(resources_id)

    def all_versions(self, resources_id: str) -> list[Resources]:
        """What is kept of one id, oldest first."""
        versions = self._versions.get(resources_id, {})
        return [versions[version] for version in sorted(versions)]

    def everything(self) -> list[Resources]:
        """All that is kept of all ids."""
        return [held for resources_id in sorted(self._versions) for held in self.all_versions(resources_id)]

    def image(self) -> list[Any]:
        """The table as plain values."""
        versions = [[held.row() for held in versions.values()] for versions in self._versions.values()]
        return [versions, list(self._references.items()), self.latest_id, self.policy_version, list(self._object_ids)]

    def restore(self, image: list[Any]) -> None:
        """Fill an empty table from an image."""
        versions, references, self.latest_id, self.policy_version, object_ids = image
        for rows in versions:
            held = [Resources(*row) for row in rows]
            self._versions[held[0].resources_id] = {record.version: record for record in held}
            self.bytes += sum(size_of(record.resources) + RECORD_OVERHEAD_BYTES for record in held)
        self._references = {(resources_id, version): count for (resources_id, version), count in references}
        self._object_ids = set(object_ids)

    def delete(self, resources_id: str) -> None:
        """Forget an id with all its versions."""
        if resources_id not in self._versions:
            raise ResourcesNotFoundError(resources_id)
        self._drop(resources_id)

    def _drop(self, resources_id: str) -> None:
        for held in self._versions.pop(resources_id).values():
            self._free(held)
        self._object_ids.discard(resources_id)
        if resources_id == self.latest_id:
            left = self.all_newest()
            newest = max(left, key=lambda held: held.update_time) if left else None
            self.latest_id = newest.resources_id if newest else None
            self.policy_version = newest.policy_version if newest else None

    def check(self) -> None:
        """Verify the sums and the latest pointer."""
        held = [record for versions in self._versions.values() for record in versions.values()]
        assert self.bytes == sum(size_of(r.resources) + RECORD_OVERHEAD_BYTES for r in held), "resource bytes"
        assert (self.latest_id is None) == (not self._versions), "latest resources"
        assert self.latest_id is None or self.latest_id in self._versions, "latest resources do not exist"
        assert all(count > 0 for count in self._references.values()), "reference counts"
