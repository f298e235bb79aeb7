"""Groups to train on: rewards, sequences of tokens, log-probabilities and messages, in rows that are all alike."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pyarrow.json
import pyarrow.parquet as pq
import pytest

import raystore as rs
from tests.cli.exports.conftest import Run, finish, lines
from tests.conftest import MakeMemoryStore
from tests.feed.conftest import Failed, running, spans_of


async def group(store: Any, task: Any, name: str, *, fails: bool = False) -> None:
    """A group of two that has ended."""
    await store.enqueue_group(task, 2, group_id=name, mode="train", tags={"env": "math"})

    def agent(rollout: Any) -> Any:
        if fails:
            raise Failed
        return spans_of(rollout, 0.5)

    async with running(store, agent):
        await store.wait_for_rollouts(rollout_ids=(await store.get_group(name)).members, timeout=20)


async def test_a_row_has_what_training_needs(make_memory_store: MakeMemoryStore, run: Run, tmp_path: Path) -> None:
    """Of each group that has ended; in JSON and in Parquet the same."""
    store = make_memory_store()
    await group(store, {"question": "17 * 23"}, "a")
    await group(store, "text", "b", fails=True)
    await store.enqueue_group("open", 2, group_id="c")
    await finish_group_of_none(store)
    run(store, "--to", tmp_path / "groups.jsonl", "--groups")
    run(store, "--to", tmp_path / "groups.parquet", "--groups")
    rows = lines(tmp_path / "groups.jsonl")
    assert pq.read_table(tmp_path / "groups.parquet").to_pylist() == rows
    first, second = rows
    assert (first["group_id"], first["status"], first["size"]) == ("a", "complete", 2)
    assert first["input"] == '{"question": "17 * 23"}' and second["input"] == "text" and first["rewards"] == [0.5, 0.5]
    assert second["status"] == "failed" and second["rewards"] == []
    assert "agent_error" in [one["outcome"] for one in second["rollouts"]] and len(second["rollouts"]) == 2
    one = first["rollouts"][0]
    (sequence,) = one["sequences"]
    assert sequence["token_ids"] == [1, 2, 3, 4, 5] and sequence["loss_mask"] == [0, 0, 0, 1, 1]
    assert sequence["logprobs"] == pytest.approx([0, 0, 0, -0.1, -0.2]) and sequence["policy_versions"] == [-1] * 5
    (call,) = one["calls"]
    assert call["prompt_ids"] == [1, 2, 3] and call["response_ids"] == [4, 5] and one["reward"] == 0.5


async def finish_group_of_none(store: Any) -> None:
    """Rollouts of a group id without a group are no group."""
    async with running(store, lambda rollout: 1.0, queue="own"):
        rollout = await store.enqueue_rollout("x", group_id="no-group", queue="own")
        await store.wait_for_rollout(rollout.rollout_id, timeout=20)


async def test_rows_are_alike_for_whoever_reads_many(
    make_memory_store: MakeMemoryStore, run: Run, tmp_path: Path
) -> None:
    """The reader of JSON that `datasets.load_dataset` is built on takes tasks of every kind in one table."""
    store = make_memory_store()
    for number, task in enumerate(["text", {"a": 1}, [1, "x"], None, 3.5]):
        await group(store, task, f"g{number}")
    run(store, "--to", tmp_path / "groups.jsonl", "--groups")
    options = pyarrow.json.ReadOptions(block_size=4096)  # so that each row is a block, as in a large file
    table = pyarrow.json.read_json(tmp_path / "groups.jsonl", read_options=options)
    assert table["input"].to_pylist() == ["text", '{"a": 1}', '[1, "x"]', "", "3.5"]
    assert table["rewards"].to_pylist() == [[0.5, 0.5]] * 5


async def test_messages_are_in_one_form(make_memory_store: MakeMemoryStore, run: Run, tmp_path: Path) -> None:
    """Texts throughout, whatever a tracer wrote."""
    store = make_memory_store()
    await store.enqueue_group("task", 1, group_id="g")
    claimed = await store.dequeue_rollout("runner-1")
    assert claimed is not None
    await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, "running")
    attributes = {
        "gen_ai.operation.name": "chat", "gen_ai.input.token_ids": [1], "gen_ai.output.token_ids": [2],
        "gen_ai.input.messages": [{"role": "user", "parts": [{"type": "text", "content": "hi"}, {"type": "blob"}]}],
        "gen_ai.output.messages": [
            {"role": "assistant", "parts": [{"type": "tool_call", "id": "c", "name": "f", "arguments": {"x": 1}}]}
        ],
    }  # fmt: skip
    ids: dict[str, Any] = {"rollout_id": claimed.rollout_id, "attempt_id": claimed.attempt.attempt_id}
    span = rs.Span.from_attributes(name="chat", attributes=attributes, **ids)
    await store.finish_attempt(claimed.rollout_id, claimed.attempt.attempt_id, [span], "succeeded")
    run(store, "--to", tmp_path / "groups.jsonl", "--groups")
    (row,) = lines(tmp_path / "groups.jsonl")
    (call,) = row["rollouts"][0]["calls"]
    (asked,), (answer,) = call["prompt"], call["completion"]
    assert asked["role"] == "user" and '"hi"' in asked["content"] and all(type(one) is str for one in asked.values())
    assert answer["content"] == "" and '"name":"f"' in answer["tool_calls"]


async def test_groups_that_were_open_come_later(make_memory_store: MakeMemoryStore, run: Run, tmp_path: Path) -> None:
    """Once they have ended, each once."""
    store, path = make_memory_store(), tmp_path / "groups.jsonl"
    await store.enqueue_group("first", 1, group_id="first", queue="own")
    await group(store, "second", "second")
    run(store, "--to", path, "--groups")
    assert [row["group_id"] for row in lines(path)] == ["second"]
    async with running(store, lambda rollout: 1.0, queue="own"):
        await store.wait_for_rollouts(rollout_ids=(await store.query_groups(group_id_in=["first"]))[0].members)
    await finish(store, "alone")
    await group(store, "third", "third")
    run(store, "--to", path, "--groups", "--status", "complete", fails=True)
    run(store, "--to", path, "--groups")
    assert [row["group_id"] for row in lines(path)] == ["second", "first", "third"]


async def test_hugging_face_reads_it(
    make_memory_store: MakeMemoryStore, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets.load_dataset`, which raystore itself does not need."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets: Any = importlib.import_module("datasets")
    store = make_memory_store()
    for number, task in enumerate(["text", {"a": 1}, None]):
        await group(store, task, f"g{number}", fails=number == 2)
    for name, kind in (("groups.jsonl", "json"), ("groups.parquet", "parquet")):
        run(store, "--to", tmp_path / name, "--groups")
        options = {"data_files": str(tmp_path / name), "split": "train", "cache_dir": str(tmp_path / "cache")}
        found = datasets.load_dataset(kind, **options)
        assert found["rewards"][:] == [[0.5, 0.5], [0.5, 0.5], []] and list(found["status"])[-1] == "failed"
        assert found[0]["rollouts"][0]["sequences"][0]["token_ids"] == [1, 2, 3, 4, 5]
