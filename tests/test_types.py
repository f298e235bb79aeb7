"""Types: what a type checker is told of the store is what the store does."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import raystore as rs
from raystore.types.contract import LightningStoreStatistics
from tests.conftest import MakeMemoryStore
from tests.helpers import claim, present

ROOT = Path(__file__).parent.parent


def test_a_program_of_a_user_is_clean_under_strict_mypy() -> None:
    """Also the mistakes in it are found: an ignored error that is none would be an error."""
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent"]
    command += ["--warn-unused-ignores", "tests/typed/program.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_checker_sees_the_public_names_and_no_others() -> None:
    """What the package names for type checkers is what it gives at run time."""
    seen = next(node for node in ast.parse(Path(rs.__file__).read_text()).body if isinstance(node, ast.If))
    named: list[str] = []
    for node in seen.body:
        assert isinstance(node, ast.ImportFrom) and node.module is not None
        for name in node.names:
            named += [name.asname or ""] if name.name != "*" else import_module(node.module).__all__
    assert sorted(named) == rs.__all__


async def test_statistics_are_those_of_the_type(make_memory_store: MakeMemoryStore) -> None:
    """No number that the type does not know, and none in the type that is not given."""
    store = make_memory_store()
    assert (await store.statistics()).keys() == LightningStoreStatistics.__annotations__.keys()


async def test_every_way_to_a_rollout_gives_its_attempt(make_memory_store: MakeMemoryStore) -> None:
    """One that was attempted is an AttemptedRollout wherever it comes from; one that was not is a plain Rollout."""
    store = make_memory_store(clock="manual")
    made = await claim(store)
    rollout_id = made.rollout_id
    never = await store.enqueue_rollout("never attempted")
    updated = await store.update_rollout(rollout_id, metadata={"k": 1})
    await store.update_attempt(rollout_id, "latest", status="succeeded")
    await store.cancel_rollouts([never.rollout_id])
    ways = {
        "update_rollout": [updated],
        "get_rollout_by_id": [await store.get_rollout_by_id(rollout_id)],
        "query_rollouts": await store.query_rollouts(rollout_id_in=[rollout_id]),
        "wait_for_rollouts": await store.wait_for_rollouts(rollout_ids=[rollout_id]),
        "wait_for_rollout": [await store.wait_for_rollout(rollout_id)],
        "as_completed": [found async for found in store.as_completed([rollout_id])],
        "completed": (await store.completed(limit=1)).items,
        "take": (await store.take(1, consumer="t")).rollouts,
    }
    for way, found in ways.items():
        assert [type(rollout) for rollout in found] == [rs.AttemptedRollout], way
        assert present(found[0]).attempt.attempt_id == made.attempt.attempt_id, way
    for plain in (
        await store.get_rollout_by_id(never.rollout_id),
        *await store.wait_for_rollouts(rollout_ids=[never.rollout_id]),
        *[found async for found in store.as_completed([never.rollout_id])],
        (await store.completed()).items[1],
    ):
        assert type(plain) is rs.Rollout and not hasattr(plain, "attempt")


def test_a_batch_keeps_its_attempts_as_json() -> None:
    """A batch that was written down is read again with the attempts of its rollouts."""
    attempt = rs.Attempt(rollout_id="r", attempt_id="a", sequence_id=1, start_time=0.0)
    rollouts = [
        rs.AttemptedRollout(rollout_id="r", input="x", start_time=0.0, attempt=attempt),
        rs.Rollout(rollout_id="s", input="x", start_time=0.0),
    ]
    batch = rs.Batch(consumer="t", number=1, rollouts=rollouts)
    again = rs.Batch.model_validate_json(batch.model_dump_json())
    assert again == batch and list(map(type, again.rollouts)) == [rs.AttemptedRollout, rs.Rollout]


@pytest.mark.parametrize(
    ("items", "limit", "offset", "total", "text"),
    [
        ([], -1, 0, 0, "<PaginatedResult (0: of 0) empty>"),
        (["a"], 2, 1, 5, "<PaginatedResult (1:3 of 5) 'a'>"),
        (["a", "b"], 2, 1, 5, "<PaginatedResult (1:3 of 5) ['a', ...]>"),
    ],
)
def test_a_page_shows_itself_as_the_references(
    items: list[str], limit: int, offset: int, total: int, text: str
) -> None:
    """Which part of how many, and the first item."""
    assert repr(rs.PaginatedResult(items=items, limit=limit, offset=offset, total=total)) == text


@pytest.mark.parametrize("module", ["raystore.types.contract", "raystore.types.spans"])
def test_checkers_see_the_public_names_of_a_module(module: str) -> None:
    """`import *`, from which checkers know the package, gives the names that the package gives."""
    assert sorted(import_module(module).__all__) == sorted(rs._NAMES[module].split())
