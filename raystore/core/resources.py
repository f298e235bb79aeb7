"""Resources by id and version, which of them is the latest, and which may be freed.

A version is immutable. Of each id the newest versions stay, and those that somebody refers to: an attempt that has not
ended. An older version that holds an object is *superseded*: once nobody refers to it, its value is freed at once,
since weights are large; its record stays and says so.
An object is in an object store for as long as the process lives that published it, and in the journal if it is small
enough. The newest version of an id is *missing* if its object is in neither; `publishing` finds that out and notes it
in `missing`. What is freed is listed in `freed`: the service then tells the publisher to drop its references, and
deletes the files of objects that no version needs.
Not here: which attempts refer to a version (`state.put_attempt`), rollouts that wait for a version (`publishing`), who
acts on `freed` (`service.service`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from raystore.core.payload import Opaque, Payload, size_of
from raystore.core.records import Resources
from raystore.errors import PayloadLostError, ResourcesNotFoundError

VERSIONS_KEPT = 8  #: newest versions of each id
OBJECT_IDS_WARNED = 16  #: more ids than this that hold objects are likely a leak
RECORD_OVERHEAD_BYTES = 500


FREED = "freed"  #: notice to a process: nobody needs the objects of a version (id, version) any more

Version = tuple[str, int]  #: id and version
Object = tuple[str | None, int]  #: address in the journal (None: it is not kept there), and bytes


class Freed(NamedTuple):
    """A version whose value was freed: the session that may drop its objects, and the journal files to delete."""

    resources_id: str
    version: int
    publisher: str | None
    addresses: list[str]


class ResourceTable:
    """All resources of a store."""

    def __init__(self, keep: int | None) -> None:
        self.keep = keep
        self._versions: dict[str, dict[int, Resources]] = {}
        self._references: dict[tuple[str, int], int] = {}
        self.latest_id: str | None = None
        self.policy_version: int | None = None
        self.bytes: int = 0
        self.object_ids: set[str] = set()  #: those whose newest version holds an object
        self._objects: dict[Version, list[Object]] = {}  # of versions that hold references
        self._addresses: dict[str, int] = {}  # in the journal: how many versions need each
        self._publishers: dict[Version, str] = {}  # sessions of the processes that hold what is referred to
        self._publishing: dict[str, int] = {}  # how many versions each of them holds
        self._unread: dict[Version, list[str]] = {}  # sessions that could not read a version
        self.missing: dict[str, tuple[int, str]] = {}  # by id: the newest version, which cannot be had, and why
        self.freed: list[Freed] = []  #: what was freed since `State.take_effects` was called last

    def __len__(self) -> int:
        return len(self._versions)

    def __contains__(self, resources_id: object) -> bool:
        return resources_id in self._versions

    def publish(
        self,
        resources_id: str,
        payload: Opaque,
        *,
        now: float,
        policy_version: int | None,
        holds_objects: bool,
        objects: list[Object] | None = None,
        publisher: str | None = None,
    ) -> Resources:
        """Store a new version and make its id the latest.

        `objects` are those that it refers to, None if that is not known; `publisher` is the session that holds them.
        """
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
        self._note_objects(made, objects, publisher)
        self.bytes += size_of(payload) + RECORD_OVERHEAD_BYTES
        self.latest_id = resources_id
        self.policy_version = policy_version
        if newest is not None:
            self._thin(resources_id)
        (self.object_ids.add if holds_objects else self.object_ids.discard)(resources_id)
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

    def record_of(self, resources_id: str, version: int) -> Resources | None:
        """What is kept of one version, whose value may be freed."""
        return self._versions.get(resources_id, {}).get(version)

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
                self._forget_objects(held)
                versions[version] = held.evolve(resources=None)

    def _free(self, held: Resources) -> None:
        self.bytes -= size_of(held.resources) + RECORD_OVERHEAD_BYTES
        self._forget_objects(held)

    def _drop_old_ids(self) -> None:
        if self.keep is None or len(self._versions) <= self.keep:
            return
        by_age = sorted(self._versions, key=lambda key: self.all_versions(key)[-1].update_time)
        for resources_id in by_age[: len(by_age) - self.keep]:
            # Whatever waits for a version that is missing names its id.
            is_named = resources_id == self.latest_id or resources_id in self.missing
            versions = self._versions[resources_id]
            if not is_named and not any((resources_id, version) in self._references for version in versions):
                self._drop(resources_id)

    def all_versions(self, resources_id: str) -> list[Resources]:
        """What is kept of one id, oldest first."""
        versions = self._versions.get(resources_id, {})
        return [versions[version] for version in sorted(versions)]

    def everything(self) -> list[Resources]:
        """All that is kept of all ids."""
        return [held for resources_id in sorted(self._versions) for held in self.all_versions(resources_id)]

    # -- objects -------------------------------------------------------------------------------------------------

    @property
    def addresses(self) -> Collection[str]:
        """The objects in the journal that somebody may ask for."""
        return self._addresses.keys()

    def is_publishing(self, session_id: str) -> bool:
        """Whether a session holds objects of a version that is there."""
        return session_id in self._publishing

    def publisher(self, resources_id: str, version: int) -> str | None:
        """The session of the process that holds the objects of a version, if that is known."""
        return self._publishers.get((resources_id, version))

    def published_by(self, session_id: str) -> list[Version]:
        """The versions whose objects a session holds."""
        if session_id not in self._publishing:
            return []
        return [key for key, publisher in self._publishers.items() if publisher == session_id]

    def objects_of(self, resources_id: str, version: int) -> list[Object]:
        """The objects that a version refers to."""
        return self._objects.get((resources_id, version), [])

    def is_there(self, resources_id: str, version: int) -> bool:
        """Whether a version exists, and its value was not freed."""
        held = self._versions.get(resources_id, {}).get(version)
        return held is not None and held.resources is not None

    def hold(self, resources_id: str, version: int, references: tuple[Any, ...], publisher: str) -> bool:
        """A process has the objects of a version: these references, which are none in a replay.

        Whether the version is there and has objects; else nobody needs what the process holds.
        """
        if not self.is_there(resources_id, version) or (resources_id, version) not in self._objects:
            return False
        versions = self._versions[resources_id]
        payload = versions[version].resources
        if isinstance(payload, Payload) and references:
            versions[version] = versions[version].evolve(resources=Payload(payload.data, references))
        self._set_publisher((resources_id, version), publisher)
        self._unread.pop((resources_id, version), None)
        return True

    def unread(self, resources_id: str, version: int, session_id: str) -> int:
        """A session could not read a version; how many could not."""
        sessions = self._unread.setdefault((resources_id, version), [])
        if session_id not in sessions:
            sessions.append(session_id)
        return len(sessions)

    def _note_objects(self, made: Resources, objects: list[Object] | None, publisher: str | None) -> None:
        if objects is None and isinstance(made.resources, Payload):  # it refers to something, which is kept nowhere
            objects = [(None, 0)]
        if not objects:
            return
        key = (made.resources_id, made.version)
        self._objects[key] = [(address, size) for address, size in objects]
        for address, _ in objects:
            if address is not None:
                self._addresses[address] = self._addresses.get(address, 0) + 1
        self._set_publisher(key, publisher)

    def _set_publisher(self, key: Version, publisher: str | None) -> None:
        before = self._publishers.pop(key, None)
        if before is not None:
            self._publishing[before] -= 1
            if not self._publishing[before]:
                del self._publishing[before]
        if publisher is not None:
            self._publishers[key] = publisher
            self._publishing[publisher] = self._publishing.get(publisher, 0) + 1

    def _forget_objects(self, held: Resources) -> None:
        key = (held.resources_id, held.version)
        objects = self._objects.pop(key, None)
        self._unread.pop(key, None)
        if objects is None:
            return
        unneeded = []
        for address, _ in objects:
            if address is None:
                continue
            self._addresses[address] -= 1
            if not self._addresses[address]:
                del self._addresses[address]
                unneeded.append(address)
        self.freed.append(Freed(*key, self._publishers.get(key), unneeded))
        self._set_publisher(key, None)

    # -- images --------------------------------------------------------------------------------------------------

    def image(self) -> list[Any]:
        """The table as plain values."""
        versions = [[held.row() for held in versions.values()] for versions in self._versions.values()]
        objects = [(*key, known, self._publishers.get(key)) for key, known in self._objects.items()]
        missing = [(resources_id, *why) for resources_id, why in self.missing.items()]
        return [
            versions, list(self._references.items()), self.latest_id, self.policy_version, list(self.object_ids),
            objects, missing, [(*key, sessions) for key, sessions in self._unread.items()],
        ]  # fmt: skip

    def restore(self, image: list[Any]) -> None:
        """Fill an empty table from an image."""
        versions, references, self.latest_id, self.policy_version, object_ids, *more = image
        for rows in versions:
            held = [Resources(*row) for row in rows]
            self._versions[held[0].resources_id] = {record.version: record for record in held}
            self.bytes += sum(size_of(record.resources) + RECORD_OVERHEAD_BYTES for record in held)
        self._references = {(resources_id, version): count for (resources_id, version), count in references}
        self.object_ids = set(object_ids)
        if not more:  # of format 1, which says nothing of objects
            for record in self.everything():
                self._note_objects(record, None, None)
            return
        objects, missing, unread = more
        for resources_id, version, known, publisher in objects:
            self._note_objects(self._versions[resources_id][version], [tuple(one) for one in known], publisher)
        self.missing = {resources_id: (version, why) for resources_id, version, why in missing}
        self._unread = {(resources_id, version): list(sessions) for resources_id, version, sessions in unread}

    def shown(self) -> list[Any]:
        """What a replay must find of objects, in an order that depends on nothing else."""
        objects = sorted((*key, known, self._publishers.get(key)) for key, known in self._objects.items())
        return [objects, sorted(self.missing.items()), sorted(self._unread.items())]

    def delete(self, resources_id: str) -> None:
        """Forget an id with all its versions."""
        if resources_id not in self._versions:
            raise ResourcesNotFoundError(resources_id)
        self._drop(resources_id)

    def _drop(self, resources_id: str) -> None:
        for held in self._versions.pop(resources_id).values():
            self._free(held)
        self.missing.pop(resources_id, None)
        self.object_ids.discard(resources_id)
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
        addresses: dict[str, int] = {}
        for (resources_id, version), objects in self._objects.items():
            assert self.is_there(resources_id, version), "objects of a version that was freed"
            for address, _ in objects:
                if address is not None:
                    addresses[address] = addresses.get(address, 0) + 1
        assert addresses == self._addresses, "objects of the journal"
        assert self._publishers.keys() <= self._objects.keys(), "somebody holds objects of a version that was freed"
        for resources_id, (version, _) in self.missing.items():
            newest = self.newest(resources_id)
            assert newest is not None and newest.version == version, "an old version is missing"
