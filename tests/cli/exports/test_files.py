"""Export to files: what is in them, going on after a kill, a store that lives, and wrong use."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

import raystore as rs
from raystore.cli.exports import parquet, records, targets
from tests.cli.exports.conftest import LARGE, Run, finish, lines, odd, refused
from tests.cli.small_run import HOSTILE, fill
from tests.conftest import MakeMemoryStore, MakeRayStore


async def test_a_line_has_all_of_a_rollout(make_memory_store: MakeMemoryStore, run: Run, tmp_path: Path) -> None:
    """Its record, its attempts, their spans and rewards, as the store has them."""
    store = make_memory_store()
    rollout_id = await finish(store, {"question": "17 * 23"}, mode="train", tags={"env": "math"}, metadata={"a": [1]})
    found = await store.get_rollout_by_id(rollout_id)
    spans = await store.query_spans(rollout_id)
    path = tmp_path / "new" / "rollouts.jsonl"
    assert run(store, "--to", path).output == f"exported 1 rollout to {path}\n"
    (row,) = lines(path)
    assert row["rollout_id"] == rollout_id and row["input"] == {"question": "17 * 23"} and row["reward"] == 1.0
    assert row["mode"] == "train" and row["tags"] == {"env": "math"} and row["metadata"] == {"a": [1]}
    assert row["config"]["max_attempts"] == 1 and row["spans_evicted"] is False
    (attempt,) = row["attempts"]
    assert (attempt["attempt_id"], attempt["worker_id"]) == (found.attempt.attempt_id, "runner-1")
    assert attempt["end_time"] == found.attempt.end_time and attempt["outcome"] == "ok"
    assert [one["span_id"] for one in attempt["spans"]] == [span.span_id for span in spans]
    agent, call, _ = attempt["spans"]
    assert call["attributes"]["gen_ai.output.token_ids"] == [4, 5] and call["parent_id"] == agent["span_id"]
    assert call["status"] == {"status_code": "OK", "description": None} and call["start_time"] == spans[1].start_time


def test_half_a_character_becomes_a_question_mark() -> None:
    """As no file can hold it; everything else stays."""
    assert records.text("a\ud800b") == "a?b" and records.text("ü汉\x1b") == "ü汉\x1b"
    assert records.plain({"\udfff": (1, [float("-inf")])}) == {"?": [1, ["-Infinity"]]}
    assert records.plain(object()) == {"opaque": "builtins.object", "bytes": None}


async def test_odd_values_are_told_and_nothing_is_opened(
    make_memory_store: MakeMemoryStore, run: Run, tmp_path: Path
) -> None:
    """A pickle by type and size, control characters escaped, bytes in base64, 10 MB attributes whole."""
    store = make_memory_store()
    await odd(store)
    run(store, "--to", tmp_path / "odd.jsonl")
    text = (tmp_path / "odd.jsonl").read_text(encoding="ascii")
    assert len(text.splitlines()) == 1 and text.rstrip("\n").isprintable()
    (row,) = lines(tmp_path / "odd.jsonl")
    assert row["input"]["opaque"].endswith("small_run._opened") and row["input"]["bytes"] > 10
    assert row["metadata"] == {"note": HOSTILE, "many": "Infinity"}
    first, second = row["attempts"]
    assert first["error"] == f"Boom {HOSTILE}" and first["spans"] == [] and second["worker_id"] == "runner-2"
    (span,) = second["spans"]
    attributes = span["attributes"]
    assert len(attributes["large"]) == LARGE and attributes["hostile"] == HOSTILE and attributes["nan"] == "NaN"
    assert base64.b64decode(attributes["bytes"]["base64"]) == b"\x00\xff" and attributes["nested"] == {"a": [1, "b"]}
    assert span["start_time"] is None and span["name"] == f"say {HOSTILE}"


# -- going on ----------------------------------------------------------------------------------------------------------

COUNT = 700

#: An export of a journal that is killed when it has taken so many rollouts.
KILLED = """
import os, signal, sys
import raystore as rs
from click.testing import CliRunner
from raystore.cli.exports import targets, parquet
from raystore.cli.exports.command import export
journal, at, kind, *arguments = sys.argv[1:]
targets.PART_ROWS = 150
cls, taken = getattr(targets, kind), 0
before = cls.take
async def take(self, one):
    global taken
    taken += 1
    if taken > int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    await before(self, one)
cls.take = take
CliRunner().invoke(export, [*arguments, "--journal", journal])
"""


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The journal of a run of so many rollouts."""
    path = tmp_path_factory.mktemp("journal")

    async def make() -> None:
        with rs.InMemoryLightningStore(journal=path) as store:
            for number in range(COUNT):
                await finish(store, number)

    asyncio.run(make())
    return path


def inputs_of(path: Path) -> list[Any]:
    """The tasks of what was exported, in its order."""
    if path.suffix == ".jsonl":
        return [row["input"] for row in lines(path)]
    if path.suffix == ".json":
        events = json.loads(path.read_text())["traceEvents"]
        return [event["args"]["input"] for event in events if event.get("cat") == "attempt"]
    import pyarrow.parquet as pq

    files = sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]
    return [json.loads(task) for file in files for task in pq.read_table(file)["input"].to_pylist()]


@pytest.mark.parametrize(
    ("name", "kind"), [("out.jsonl", "Lines"), ("out.json", "Trace"), ("out", "Parquet"), ("out.parquet", "Parquet")]
)
def test_an_export_that_was_killed_goes_on(
    journal: Path, run: Run, tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice; nothing is there twice, nothing is missing, and the order is that in which the rollouts finished."""
    monkeypatch.setattr("raystore.cli.exports.targets.PART_ROWS", 150)
    path = tmp_path / name
    for at in (300, 290):
        done = subprocess.run([sys.executable, "-c", KILLED, journal, str(at), kind, "--to", path], timeout=100)
        assert done.returncode == -signal.SIGKILL
    before = list(tmp_path.rglob("*.cursor"))
    assert len(before) == 1 and 256 <= json.loads(before[0].read_text())["count"] < COUNT
    with rs.recover(journal) as store:
        said = run(store, "--to", path).output
        assert "were there before" in said
        assert inputs_of(path) == list(range(COUNT))
        if kind == "Parquet":
            assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("*.parts"))
        else:
            assert run(store, "--to", path).output.startswith("exported 0 rollouts")
            assert inputs_of(path) == list(range(COUNT))


def test_an_export_that_is_interrupted_says_that_it_goes_on(
    journal: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl+C, as well as a store or a disk that fails in the midst."""
    path, before, taken = tmp_path / "out.jsonl", targets.Lines.take, 0
    broken: BaseException = KeyboardInterrupt()

    async def take(self: targets.Lines, one: Any) -> None:
        nonlocal taken
        taken += 1
        if taken > 300:
            raise broken
        await before(self, one)

    monkeypatch.setattr(targets.Lines, "take", take)
    with rs.recover(journal) as store:
        assert "say the same again, and it goes on" in run(store, "--to", path, fails=True).stderr
        broken = OSError(28, "No space left on device")
        assert "No space left on device" in refused(run(store, "--to", path, fails=True))
        broken = rs.StoreUnavailableError("train", "it has died")
        assert "it has died" in refused(run(store, "--to", path, fails=True))
        monkeypatch.undo()
        run(store, "--to", path)
    assert inputs_of(path) == list(range(COUNT))


async def test_a_store_that_lives_is_exported_again_and_again(
    make_ray_store: MakeRayStore, run: Run, tmp_path: Path
) -> None:
    """Each time what has finished since, on Ray as well; what had not finished is replaced by what it is now."""
    store, path = make_ray_store(), tmp_path / "live.jsonl"
    statuses = "succeeded,queuing"
    await finish(store, 0)
    await store.enqueue_rollout(1, queue="later")
    run(store, "--to", path, "--status", statuses)
    assert [(row["input"], row["status"]) for row in lines(path)] == [(0, "succeeded"), (1, "queuing")]
    await finish(store, 2)
    said = run(store, "--to", path, "--status", statuses).output
    assert "exported 1 rollout" in said and "and 1 that have not finished; 1 were there before" in said
    assert [(row["input"], row["status"]) for row in lines(path)] == [
        (0, "succeeded"), (2, "succeeded"), (1, "queuing"),
    ]  # fmt: skip


async def test_memory_is_bounded(make_memory_store: MakeMemoryStore, run: Run, tmp_path: Path) -> None:
    """An export of 80 MB of spans holds a fraction of them at any time."""
    store = make_memory_store()
    for number in range(400):
        rollout = await store.start_rollout(number)
        ids: dict[str, Any] = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
        attributes = {"text": f"{number}" * 70_000}
        span = rs.Span.from_attributes(attributes=attributes, start_time=1.0, end_time=2.0, **ids)
        await store.finish_attempt(rollout.rollout_id, rollout.attempt.attempt_id, [span], "succeeded")
    for name in ("out.jsonl", "out.json", "out"):
        tracemalloc.start()
        try:
            run(store, "--to", tmp_path / name)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < (25_000_000 if name != "out" else 70_000_000), (name, peak)
    assert (tmp_path / "out.jsonl").stat().st_size > 75_000_000


# -- which ones --------------------------------------------------------------------------------------------------------


async def test_filters_choose(make_memory_store: MakeMemoryStore, run: Run, tmp_path: Path) -> None:
    """Mode, tags, status and time; numbers and true are taken for such in a tag."""
    store = make_memory_store(clock="manual")
    await fill(store)

    def ids(*options: object) -> set[str]:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        run(store, "--to", path, *options)
        return {row["rollout_id"] for row in lines(path)}

    assert ids("--mode", "val") == {"val-0", "val-1", "val-2"}
    assert ids("--status", "failed", "--tag", "env=code") == {"raises-0", "raises-1", "raises-2"}
    assert ids("--status", "running,queuing", "--mode", "train") == {"stuck"}
    assert {"waiting", "stuck", "last"} == ids("--status", "running,preparing,queuing,requeuing")
    whole = {row.rollout_id: row for row in await store.query_rollouts()}
    since = whole["hostile"].end_time
    assert since is not None
    assert ids("--since", f"{since:.6f}") == {
        one for one, row in whole.items() if row.end_time is not None and row.end_time >= round(since, 6)
    }
    assert ids("--since", "2100-01-01T00:00") == set()
    await finish(store, 1, tags={"level": 3, "hard": True})
    assert len(ids("--tag", "level=3", "--tag", "hard=true")) == 1 and ids("--tag", "level=03") == set()


async def test_places_are_found_again_when_others_have_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records before a place may disappear between two pages; each that stays comes once."""
    from raystore.cli.exports import source

    monkeypatch.setattr(source, "OVERLAP", 4)

    class Record:
        def __init__(self, name: str) -> None:
            self.name = name

    there = [Record(f"{number:03}") for number in range(200)]
    gone: list[str] = []

    async def read(limit: int, offset: int) -> tuple[list[Any], int]:
        return there[offset : offset + limit], len(there)

    place, found = source.Place(), []
    while page := await place.next(read, 10, "name"):
        found += [one.name for one in page]
        for _ in range(7):  # more than the overlap
            if there and there[0].name in found:
                gone.append(there.pop(0).name)
    assert found == [f"{number:03}" for number in range(200)] and len(gone) > 50
    there[:] = [Record("new")]  # and of all that was read nothing is left
    assert [one.name for one in await place.next(read, 10, "name")] == ["new"]
    assert await place.next(read, 10, "name") == []


# -- wrong use ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--to", "x.jsonl", "--status", "succeded"], "did you mean 'succeeded'"),
        (["--to", "x.jsonl", "--since", "yesterday"], "--since 'yesterday' is no time; write 2h"),
        (["--to", "x.jsonl", "--header", "a=b"], "are for a collector"),
        (["--to", "http://h", "--header", "a b=c"], "--header 'a b=c' is no header"),
        (["--to", "http://h", "--header", "a=b\nEvil: 1"], "is no header"),
        (["--to", "x.csv"], "'x.csv' does not say a format; name it .jsonl"),
        (["--to", "x.json", "--groups"], "as jsonl or parquet, and not trace"),
        (["--to", "x.json", "--format", "jsonl"], "'x.json' is named as trace is"),
        (["--to", "http://h", "--format", "jsonl"], "format jsonl does not go to 'http://h'"),
        (["--to", "x.jsonl", "--format", "otlp"], "format otlp does not go to 'x.jsonl'"),
        (["--to", "http://h", "--status", "running"], "takes what has ended, and not running"),
        (["--to", "x.jsonl", "--groups", "--status", "open"], "no status of a group that has ended"),
        (["--to", "/proc/none/x.jsonl"], "cannot write /proc/none/x.jsonl"),
        (["--to", "/proc/none/x\x1b[31m.jsonl"], "\\x1b"),
    ],
)
def test_wrong_use_is_one_clear_line(
    make_memory_store: MakeMemoryStore, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str],
    said: str,
) -> None:  # fmt: skip
    """And changes nothing."""
    monkeypatch.chdir(tmp_path)
    assert said in refused(run(make_memory_store(), *options, fails=True))
    assert os.listdir(tmp_path) == []


async def test_nothing_is_replaced_unasked(make_memory_store: MakeMemoryStore, run: Run, tmp_path: Path) -> None:
    """Neither a file that this export did not begin, nor that of another one; `--anew` says so."""
    store, path = make_memory_store(), tmp_path / "mine.jsonl"
    await finish(store, 0)
    path.write_text("my notes\n")
    told = refused(run(store, "--to", path, fails=True))
    assert "is there, and no cursor file" in told and "--anew" in told and path.read_text() == "my notes\n"
    run(store, "--to", path, "--anew")
    assert len(lines(path)) == 1
    told = refused(run(store, "--to", path, "--mode", "val", fails=True))
    assert "belongs to an export with mode None, and now it is 'val'" in told and "--anew" in told
    other = make_memory_store()
    assert "belongs to an export with store" in refused(run(other, "--to", path, fails=True))
    cursor = tmp_path / "mine.jsonl.cursor"
    path.write_text("")
    assert "was changed since" in refused(run(store, "--to", path, fails=True))
    cursor.write_text("{}")
    assert "is no cursor file" in refused(run(store, "--to", path, fails=True))
    cursor.write_text(json.dumps({"version": 99, "what": {}, "place": None, "state": None, "count": 0}))
    assert "another version" in refused(run(store, "--to", path, fails=True))


async def test_parquet_without_pyarrow_says_what_to_install(
    make_memory_store: MakeMemoryStore, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is written."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    told = refused(run(make_memory_store(), "--to", tmp_path / "x.parquet", fails=True))
    assert 'pip install "raystore[export]"' in told and list(tmp_path.iterdir()) == []
    with pytest.raises(ModuleNotFoundError):
        parquet.library()
