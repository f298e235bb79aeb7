"""Resources: publish, read, delete.

Not here: what each method means (`raystore.api`).
"""

from __future__ import annotations

from raystore import convert
from raystore.client.connection import Connection
from raystore.convert import validated
from raystore.types import (
    NamedResources,
    PaginatedResult,
    ResourcesUpdate,
    SortOrder,
)


class ResourceMethods(Connection):
    """Resources: publish, read, delete."""

    async def add_resources(self, resources: NamedResources, *, policy_version: int | None = None) -> ResourcesUpdate:
        return await self._put_resources(None, resources, policy_version)

    async def update_resources(
        self, resources_id: str, resources: NamedResources, *, policy_version: int | None = None
    ) -> ResourcesUpdate:
        return await self._put_resources(convert.identifier("resources_id", resources_id), resources, policy_version)

    async def _put_resources(
        self, resources_id: str | None, resources: NamedResources, policy_version: int | None
    ) -> ResourcesUpdate:
        payload, holds_objects = self._encoder.resources(self._boxed(validated(NamedResources, resources)))
        arguments = {
            "resources_id": resources_id,
            "resources": payload,
            "policy_version": validated(int | None, policy_version),
            "holds_objects": holds_objects,
        }
        return convert.resources_update(await self._transport.call("put_resources", arguments))

    def _boxed(self, resources: NamedResources) -> NamedResources:
        """The resources as they should travel; a store on Ray moves large objects to the object store."""
        return resources

    async def get_resources_by_id(self, resources_id: str, version: int | None = None) -> ResourcesUpdate | None:
        arguments = {
            "resources_id": convert.identifier("resources_id", resources_id),
            "version": None if version is None else convert.whole("version", version, at_least=-(2**31)),
        }
        answer = await self._transport.call("get_resources", arguments)
        return convert.resources_update(answer) if answer else None

    async def get_latest_resources(self) -> ResourcesUpdate | None:
        answer = await self._transport.call("get_latest_resources", {})
        return convert.resources_update(answer) if answer else None

    async def query_resources(
        self,
        *,
        resources_id: str | None = None,
        resources_id_contains: str | None = None,
        sort_by: str | None = None,
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[ResourcesUpdate]:
        arguments = {
            "resources_id": convert.optional_identifier("resources_id", resources_id),
            "resources_id_contains": convert.optional_text("resources_id_contains", resources_id_contains),
            "sort_by": sort_by,
            "sort_order": sort_order,
        }
        return await self._page("query_resources", arguments, limit, offset, convert.resources_update)

    async def delete_resources(self, resources_id: str) -> None:
        await self._transport.call(
            "delete_resources", {"resources_id": convert.identifier("resources_id", resources_id)}
        )
