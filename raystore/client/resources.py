"""Resources: publish, read, delete.

Not here: what each method means (`raystore.api`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raystore.client.connection import Connection
from raystore.core.payload import Opaque, Payload
from raystore.errors import InvalidValueError
from raystore.types import (
    LLM,
    NamedResources,
    ObjectResource,
    PaginatedResult,
    PromptTemplate,
    ProxyLLM,
    Resource,
    ResourcesUpdate,
    SortOrder,
)
from raystore.values.objects import Kept, Origin, Parts
from raystore.wire import checks, convert
from raystore.wire.checks import validated

TO_PUBLISH = (
    "give each its name, {'prompt': rs.PromptTemplate(...)}, and wrap a plain value: rs.ObjectResource(value=...)"
)
TO_DERIVE = (
    "an LLM, ProxyLLM, PromptTemplate or ObjectResource; derive your class from one of these and leave its "
    "resource_type as it is, or put it into one: rs.ObjectResource(value=...)"
)
_KINDS = {"llm": LLM, "proxy_llm": ProxyLLM, "prompt_template": PromptTemplate, "object": ObjectResource}
COUNTED = "count the versions; what they are called can be told by resources_id"


@dataclass(slots=True)
class Boxed:
    """Resources as they travel, and what became of their objects."""

    resources: NamedResources
    objects: list[Kept] = field(default_factory=list)  # of each that is a reference now
    files: list[tuple[str, Parts]] = field(default_factory=list)  # address and bytes of those that the journal keeps
    asked: Any = None  # which process was the store's before


def _check_kinds(resources: Any) -> None:
    """Refuse a kind of resource that a user made up; what is no resource at all is told by `validated`."""
    for name, resource in resources.items() if isinstance(resources, Mapping) else ():
        if isinstance(resource, Resource) and not isinstance(
            resource, _KINDS.get(str(vars(resource).get("resource_type")), ())
        ):
            raise InvalidValueError(f"resources[{name!r}]", resource, TO_DERIVE)


class ResourceMethods(Connection):
    """Resources: publish, read, delete."""

    async def add_resources(self, resources: NamedResources, *, policy_version: int | None = None) -> ResourcesUpdate:
        return await self._put_resources(None, resources, policy_version)

    async def update_resources(
        self, resources_id: str, resources: NamedResources, *, policy_version: int | None = None
    ) -> ResourcesUpdate:
        return await self._put_resources(checks.identifier("resources_id", resources_id), resources, policy_version)

    async def _put_resources(
        self, resources_id: str | None, resources: NamedResources, policy_version: int | None
    ) -> ResourcesUpdate:
        _check_kinds(resources)
        boxed = await self._boxed(resources_id, validated("resources", NamedResources, resources, TO_PUBLISH))
        payload, holds_objects = self._encoder.resources(boxed.resources)
        objects = [(kept.address, kept.size) for kept in boxed.objects]
        if isinstance(payload, Payload):  # references within small values are kept nowhere
            objects += [(None, 0)] * (len(payload.refs) - len(objects))
        arguments = {
            "resources_id": resources_id,
            "resources": payload,
            "policy_version": validated("policy_version", int | None, policy_version, COUNTED),
            "holds_objects": holds_objects,
            "objects": objects,
        }
        answer = await self._transport.call("put_resources", arguments)
        await self._published(convert.row(answer), payload, boxed)
        return self._opened(answer, payload)

    async def _boxed(self, resources_id: str | None, resources: NamedResources) -> Boxed:
        """The resources as they should travel; a store on Ray moves large objects to the object store."""
        return Boxed(resources)

    async def _published(self, answer: Any, payload: Opaque, boxed: Boxed) -> None:
        """Do what is left to do for objects, now that the store has the version."""

    def _origin_of_objects(self) -> Origin:
        """Where objects may be found that are in no object store any more."""
        return Origin()

    def _opened(self, answer: convert.Row, payload: Opaque = None) -> ResourcesUpdate:
        return convert.to_resources(answer, self._origin_of_objects(), payload)

    async def get_resources_by_id(self, resources_id: str, version: int | None = None) -> ResourcesUpdate | None:
        arguments = {
            "resources_id": checks.identifier("resources_id", resources_id),
            "version": None if version is None else checks.whole("version", version, at_least=-(2**31)),
        }
        answer = await self._transport.call("get_resources", arguments)
        return self._opened(answer) if answer else None

    async def get_latest_resources(self) -> ResourcesUpdate | None:
        answer = await self._transport.call("get_latest_resources", {})
        return self._opened(answer) if answer else None

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
            "resources_id": checks.optional_identifier("resources_id", resources_id),
            "resources_id_contains": checks.optional_text("resources_id_contains", resources_id_contains),
            "sort_by": sort_by,
            "sort_order": sort_order,
        }
        return await self._page("query_resources", arguments, limit, offset, self._opened)

    async def delete_resources(self, resources_id: str) -> None:
        await self._transport.call(
            "delete_resources", {"resources_id": checks.identifier("resources_id", resources_id)}
        )
