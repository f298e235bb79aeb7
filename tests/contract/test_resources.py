"""Resources: versions, latest, references, freeing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import raystore as rs
from raystore.types.contract import LLM, AttemptedRollout, ObjectResource, PromptTemplate, ProxyLLM
from tests.helpers import AnyStore, claim, present

PROMPT = PromptTemplate(template="hi {x}", engine="f-string")


async def test_add_resources_becomes_latest(store: AnyStore) -> None:
    """A new id each time, version 1, and the latest."""
    first = await store.add_resources({"p": PROMPT}, policy_version=3)
    assert first.resources_id.startswith("rs-") and len(first.resources_id) == 15
    assert (first.version, first.policy_version, first.resources) == (1, 3, {"p": PROMPT})
    assert first.create_time == first.update_time
    second = await store.add_resources({})
    assert present(await store.get_latest_resources()).resources_id == second.resources_id
    assert await store.get_resources_by_id(first.resources_id) == first


async def test_update_resources_is_an_upsert(store: AnyStore) -> None:
    """An unknown id starts at version 1; each update counts up, keeps the creation time and becomes the latest."""
    first = await store.update_resources("default", {"p": PROMPT})
    await store.add_resources({})
    store.testing.tick(2)
    second = await store.update_resources("default", {})
    assert (first.version, second.version) == (1, 2)
    assert (second.create_time, second.update_time) == (first.create_time, first.update_time + 2)
    assert await store.get_latest_resources() == second
    assert await store.get_resources_by_id("default", version=1) == first


async def test_unknown_resources(store: AnyStore) -> None:
    """Reads are lenient, deletion is not."""
    assert await store.get_latest_resources() is None
    assert await store.get_resources_by_id("nope") is None
    assert await store.get_resources_by_id("nope", version=1) is None
    with pytest.raises(rs.ResourcesNotFoundError, match="nope not found"):
        await store.delete_resources("nope")


async def test_query_resources(store: AnyStore) -> None:
    """The newest version of each id, in the order in which the ids came."""
    for name in ("a1", "b", "a2", "a1"):
        await store.update_resources(name, {})
    assert [(u.resources_id, u.version) for u in await store.query_resources()] == [("a1", 2), ("b", 1), ("a2", 1)]
    assert [u.resources_id for u in await store.query_resources(resources_id_contains="a")] == ["a1", "a2"]
    assert [u.resources_id for u in await store.query_resources(resources_id="b")] == ["b"]
    by_version = await store.query_resources(sort_by="version", sort_order="desc", limit=1)
    assert (by_version[0].resources_id, by_version.total) == ("a1", 3)


async def test_resources_of_every_kind_round_trip(store: AnyStore) -> None:
    """The union is validated and comes back with its classes."""
    resources: rs.NamedResources = {
        "llm": LLM(endpoint="http://x/v1", model="m", sampling_parameters={"t": 1}),
        "proxy": ProxyLLM(endpoint="http://x/v1", model="m"),
        "prompt": PROMPT,
        "weights": ObjectResource(value={"w": (1.0, 2.0)}),
    }
    await store.add_resources(resources)
    found = present(await store.get_latest_resources()).resources
    assert found == resources and [type(r) for r in found.values()] == [type(r) for r in resources.values()]
    assert isinstance(found["weights"], ObjectResource) and isinstance(found["prompt"], PromptTemplate)
    assert found["weights"].get() == {"w": (1.0, 2.0)}
    assert found["prompt"].format(x="you") == "hi you"
    rollout = await claim(store)
    assert type(rollout) is AttemptedRollout
    assert isinstance(found["proxy"], ProxyLLM)
    url = found["proxy"].with_attempted_rollout(rollout).get_base_url()
    assert url == f"http://x/rollout/{rollout.rollout_id}/attempt/{rollout.attempt.attempt_id}/v1"
    with pytest.raises(rs.InvalidValueError):
        await store.add_resources({"x": 5})  # type: ignore[dict-item]  # wrong on purpose
    assert (await store.statistics())["total_resources"] == 1


async def test_version_and_policy_are_stamped_at_the_claim(store: AnyStore) -> None:
    """An attempt carries the version that was newest when it was claimed, not when it was enqueued."""
    await store.update_resources("w", {}, policy_version=1)
    await store.enqueue_rollout("x")
    await store.update_resources("w", {}, policy_version=2)
    claimed = present(await store.dequeue_rollout())
    assert (claimed.resources_id, claimed.attempt.resources_version, claimed.attempt.policy_version) == ("w", 2, 2)
    unknown = await store.start_rollout("x", resources_id="nope")
    assert unknown.attempt.resources_version is None


async def test_a_lower_policy_version_is_noted(store: AnyStore) -> None:
    """A model may be rolled back; the change feed says so."""
    await store.update_resources("w", {}, policy_version=5)
    await store.update_resources("w", {}, policy_version=4)
    page = await store.changes(kinds=["resources"])
    assert [present(change.detail).get("lower_than") for change in page.items] == [None, 5]


async def test_old_versions_go_unless_somebody_uses_them(store: AnyStore) -> None:
    """Of an id the last 8 versions stay, and those of attempts that run."""
    await store.update_resources("w", {"p": PROMPT})
    rollout = await claim(store)
    for _ in range(10):
        await store.update_resources("w", {})
    assert present(await store.get_resources_by_id("w", version=1)).resources == {"p": PROMPT}
    assert await store.get_resources_by_id("w", version=2) is None
    assert await store.get_resources_by_id("w", version=4) is not None
    await store.update_attempt(rollout.rollout_id, "latest", status="succeeded")
    assert await store.get_resources_by_id("w", version=1) is None


def object_of(update: rs.ResourcesUpdate | None) -> Any:
    """The value of the object resource "o"."""
    resource = present(update).resources["o"]
    assert isinstance(resource, ObjectResource)
    return resource.get()


async def test_superseded_object_is_freed_once_nobody_uses_it(store: AnyStore) -> None:
    """Weights of an older version go with the last attempt that uses them; the record stays and says so."""
    await store.update_resources("w", {"o": ObjectResource(value=[1])})
    rollout = await claim(store)
    await store.update_resources("w", {"o": ObjectResource(value=[2])})
    assert object_of(await store.get_resources_by_id("w", version=1)) == [1]
    await store.update_attempt(rollout.rollout_id, "latest", status="failed")
    with pytest.raises(rs.PayloadLostError, match="w version 1 is lost: version 2 replaced it"):
        await store.get_resources_by_id("w", version=1)
    assert object_of(await store.get_resources_by_id("w")) == [2]


async def test_keep_resources(make_store: Callable[..., AnyStore]) -> None:
    """Only the newest ids stay, and those that an attempt uses."""
    store = make_store(keep_resources=2)
    first = await store.add_resources({})
    rollout = await claim(store)
    made = [await store.add_resources({}) for _ in range(3)]
    kept = {update.resources_id for update in await store.query_resources()}
    assert kept == {first.resources_id, made[1].resources_id, made[2].resources_id}
    await store.update_attempt(rollout.rollout_id, "latest", status="succeeded")
    assert {u.resources_id for u in await store.query_resources()} == {made[1].resources_id, made[2].resources_id}


async def test_delete_resources(store: AnyStore) -> None:
    """A deleted id is gone; the latest is then what was updated last of the others."""
    first = await store.add_resources({}, policy_version=1)
    store.testing.tick(1)
    second = await store.add_resources({})
    await store.delete_resources(second.resources_id)
    assert await store.get_resources_by_id(second.resources_id) is None
    assert present(await store.get_latest_resources()).resources_id == first.resources_id


async def test_arguments_are_taken_by_value(store: AnyStore) -> None:
    """Changing a resource after publishing it changes nothing in the store."""
    prompt = PromptTemplate(template="a", engine="f-string")
    await store.add_resources({"p": prompt})
    prompt.template = "b"
    published = present(await store.get_latest_resources()).resources["p"]
    assert isinstance(published, PromptTemplate) and published.template == "a"
