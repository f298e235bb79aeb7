"""Parquet, read back by pyarrow, and by polars and pandas where they are: the same rows as in JSON."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import raystore as rs
from tests.cli.exports.conftest import LARGE, Run, finish, lines, odd
from tests.cli.small_run import HOSTILE
from tests.conftest import MakeMemoryStore


async def filled(make: MakeMemoryStore) -> rs.InMemoryLightningStore:
    """A store with rollouts of several kinds."""
    store = make()
    await finish(store, {"question": "17 * 23"}, mode="train", tags={"env": "math"})
    await finish(store, "text", spans=3, reward=None)
    await finish(store, None, reward=float("inf"))
    await odd(store)
    return store


async def test_pyarrow_reads_the_rows_of_json(make_memory_store: MakeMemoryStore, run: Run, tmp_path: Path) -> None:
    """With types; what has no type of its own is JSON in a text."""
    store = await filled(make_memory_store)
    run(store, "--to", tmp_path / "out.jsonl")
    run(store, "--to", tmp_path / "out.parquet")
    run(store, "--to", tmp_path / "out")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.equals(pq.read_table(tmp_path / "out"))
    found, expected = table.to_pylist(), lines(tmp_path / "out.jsonl")
    assert [row["rollout_id"] for row in found] == [row["rollout_id"] for row in expected]
    for row, same in zip(found, expected, strict=True):
        for name in ("input", "metadata", "tags", "config"):
            assert (None if row[name] is None else json.loads(row.pop(name))) == same.pop(name)
        for attempt, its in zip(row.pop("attempts"), same.pop("attempts"), strict=True):
            for span, like in zip(attempt.pop("spans"), its.pop("spans"), strict=True):
                for name in ("attributes", "events", "links", "resource"):
                    assert json.loads(span.pop(name)) == like.pop(name)
                assert span == like
            assert attempt.pop("metadata") is None and its.pop("metadata") is None
            assert float(attempt.pop("reward") or 0) == float(its.pop("reward") or 0)
            assert attempt == its
        assert float(row.pop("reward") or 0) == float(same.pop("reward") or 0)
        row.pop("metadata", None), same.pop("metadata", None)
        row.pop("input", None), same.pop("input", None)
        assert row == same
    assert [row["reward"] for row in table.to_pylist()] == [1.0, None, float("inf"), None]


async def test_odd_values_come_back(make_memory_store: MakeMemoryStore, run: Run, tmp_path: Path) -> None:
    """10 MB attributes, control characters, pickles by type and size."""
    store = make_memory_store()
    await odd(store)
    run(store, "--to", tmp_path / "odd.parquet")
    (row,) = pq.read_table(tmp_path / "odd.parquet").to_pylist()
    assert json.loads(row["input"])["opaque"].endswith("_opened")
    (span,) = row["attempts"][1]["spans"]
    attributes = json.loads(span["attributes"])
    assert span["name"] == f"say {HOSTILE}" and len(attributes["large"]) == LARGE and attributes["nan"] == "NaN"
    assert row["attempts"][0]["error"] == f"Boom {HOSTILE}"


@pytest.mark.parametrize("library", ["polars", "pandas"])
async def test_others_read_it(make_memory_store: MakeMemoryStore, run: Run, tmp_path: Path, library: str) -> None:
    """Where they are installed; raystore needs neither."""
    pytest.importorskip(library)
    read: Any = importlib.import_module(library).read_parquet
    run(await filled(make_memory_store), "--to", tmp_path / "out.parquet")
    assert list(read(tmp_path / "out.parquet")["status"]) == ["succeeded"] * 4


def test_an_empty_store_has_an_empty_table(make_memory_store: MakeMemoryStore, run: Run, tmp_path: Path) -> None:
    """With all columns."""
    run(make_memory_store(), "--to", tmp_path / "none.parquet")
    table = pq.read_table(tmp_path / "none.parquet")
    assert table.num_rows == 0 and {"rollout_id", "reward", "attempts"} <= {*table.column_names}
