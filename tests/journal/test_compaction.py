"""Snapshots: a helper replaces closed segments by the state, and everything is still there."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import raystore as rs
from raystore.core.snapshot import digest, verify
from raystore.journal import compaction
from raystore.journal.files import BODIES, SNAPSHOT, Directory, JournalFile
from raystore.journal.opening import read_run
from tests.helpers import make_span, present


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot every few hundred operations, and digests nearly at once."""
    monkeypatch.setattr(compaction, "OPERATIONS", 300)
    monkeypatch.setattr(compaction, "VERIFY_LAG", 20)


def store_of(path: Path, **options: Any) -> rs.InMemoryLightningStore:
    return rs.InMemoryLightningStore(journal=path, durability="process", **options)


async def work(store: rs.InMemoryLightningStore, count: int, *, text: str = "x") -> list[Any]:
    """Rollouts with two spans each, most of them finished; their ids."""
    made = []
    for number in range(count):
        enqueued = await store.enqueue_rollout({"n": number, "text": text * 50}, tags={"even": number % 2 == 0})
        rollout = present(await store.dequeue_rollout())
        spans = [make_span(rollout, sequence_id=i, attributes={"body": f"{number}/{i}" * 20}) for i in (1, 2)]
        await store.add_many_spans(spans)
        if number % 10:
            await store.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status="succeeded")
        made.append(enqueued.rollout_id)
    return made


async def until(happened: Callable[[], Any], what: str, seconds: int = 30) -> None:
    """Wait for a helper."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, what
        await asyncio.sleep(0.02)


def snapshotter_of(store: Any) -> Any:
    return store._service.journal.snapshotter


async def until_idle(store: rs.InMemoryLightningStore) -> None:
    """Wait until no helper makes a snapshot."""
    await until(lambda: not snapshotter_of(store)._thread, "a helper hangs")


def newest(path: Path) -> tuple[int, int]:
    """Up to which segment the newest snapshot on the disk goes; it is whole, or it would not have its name."""
    return max((found[:2] for found in Directory(path).segments(SNAPSHOT)), default=(0, 0))


def assert_replaced(path: Path) -> None:
    """There is one snapshot, no segment that it replaces, and nothing that a helper has not finished."""
    directory = Directory(path)
    (snapshot,) = directory.segments(SNAPSHOT)
    assert all(segment[:2] > snapshot[:2] for segment in directory.segments())
    assert not list(path.glob("*.snapshot.*.new")) and not list(path.glob("*.bodies.*.new"))


async def until_snapshot(
    store: rs.InMemoryLightningStore, path: Path, before: tuple[int, int] = (0, 0), what: str = "no snapshot was made"
) -> None:
    """Wait until there is a snapshot that goes further, and its helper has ended."""
    await until(lambda: newest(path) > before and not snapshotter_of(store)._thread, what)


async def test_a_snapshot_takes_the_place_of_segments(tmp_path: Path) -> None:
    """The journal is short, the state is the same, and bodies are read from where the helper left them."""
    path = tmp_path / "j"
    store = store_of(path)
    made = await work(store, 400)
    await until_snapshot(store, path)
    first = newest(path)
    made += await work(store, 100)
    await until_snapshot(store, path, first, "no second snapshot was made")
    made += await work(store, 30)
    before = digest(store._service.state)
    assert digest(read_run(path).state) == before
    directory = Directory(path)
    await until(lambda: not snapshotter_of(store)._thread, "a helper that was at work did not end")
    assert_replaced(path)
    assert newest(path) > first and snapshotter_of(store).snapshots_made >= 2
    assert len(directory.segments()) <= 2
    assert snapshotter_of(store).operations < 1_000
    store.close()
    again = store_of(path)
    assert again._service.state.entries.keys() == set(made)
    await again.check()
    for number in (0, 7, 200, 399, 529):
        spans = await again.query_spans(made[number])
        n = number if number < 400 else number - 500
        assert [span.attributes["body"] for span in spans] == [f"{n}/{i}" * 20 for i in (1, 2)]
    again.close()


async def test_deleted_rollouts_leave_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retention bounds the disk: bodies of what was deleted are dropped with the segment, or by a copy without them."""
    path = tmp_path / "j"
    store = store_of(path, retention={"max_rollouts": 20})
    made = []
    for _ in range(6):
        made += await work(store, 150)
        await store.release(made[-150:])
    await store.statistics()
    await until_snapshot(store, path)
    made += await until_made(store, path, newest(path))
    await until(lambda: not snapshotter_of(store)._thread, "a helper that was at work did not end")
    left = await store.query_rollouts()
    gone = set(made) - {rollout.rollout_id for rollout in left}
    assert len(gone) > 700  # of 900 that were released, but for 20 and those that still run
    assert_replaced(path)
    kept = b"".join(file.path.read_bytes() for file in Directory(path).segments(BODIES))
    on_disk = [rollout_id for rollout_id in gone if rollout_id.encode() in kept]
    assert len(on_disk) <= len(left), "files of which less than half is needed are copied without the rest"
    for rollout in left:
        assert len(await store.query_spans(rollout.rollout_id)) == 2
    store.close()


async def test_a_helper_that_dies_leaves_everything(tmp_path: Path) -> None:
    """SIGKILL at any moment of a helper: the journal is whole, and another one finishes."""
    path = tmp_path / "j"
    store = store_of(path)
    kills = 0
    for round_ in range(40):
        await work(store, 40)
        helper = snapshotter_of(store)._helper
        if helper is not None and round_ < 30:
            await asyncio.sleep(0.01 * (round_ % 12))
            helper.send_signal(signal.SIGKILL)
            kills += 1
            if kills % 5 == 1:
                await until_idle(store)
                assert digest(read_run(path).state) == digest(store._service.state)
    await until_idle(store)
    assert kills > 2
    await until_made(store, path, newest(path))
    assert digest(read_run(path).state) == digest(store._service.state)
    store.close()
    again = store_of(path)
    await again.check()
    again.close()


@pytest.mark.parametrize("point", ["snapshot.written", "bodies.written"])
async def test_a_helper_on_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, point: str
) -> None:
    """What it could not finish takes no room; the store goes on, and the next helper makes a snapshot."""
    path = tmp_path / "j"
    monkeypatch.setenv("RAYSTORE_FAILPOINTS", f"{point}=full")  # read by the helper, this process being at work already
    store = store_of(path, retention={"max_rollouts": 20})
    await store.release(await work(store, 300))
    await until(lambda: f"failpoint {point}" in caplog.text, "it did not fail")
    await until_idle(store)
    assert not list(path.glob("*.snapshot.*.new")) and not list(path.glob("*.bodies.*.new"))
    monkeypatch.delenv("RAYSTORE_FAILPOINTS")
    await until_made(store, path, newest(path))
    assert digest(read_run(path).state) == digest(store._service.state)
    store.close()


@pytest.mark.parametrize("point", ["snapshot.written", "snapshot.synced"])
async def test_a_helper_that_is_killed_is_no_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, point: str
) -> None:
    """As by a system without memory: it is told, tried less and less often, and not counted."""
    path = tmp_path / "j"
    monkeypatch.setenv("RAYSTORE_FAILPOINTS", f"{point}=kill")  # read by the helper, this process being at work already
    store = store_of(path)
    for tries in range(1, 4):
        for _ in range(60):
            await work(store, 40)
            await until_idle(store)
            if caplog.text.count("SIGKILL") == tries:
                break
        assert caplog.text.count("no snapshot was made (the helper was ended by SIGKILL") == tries
        assert snapshotter_of(store).operations >= compaction.OPERATIONS << (tries - 1)
    assert newest(path) == (0, 0)
    told = present((await store.statistics())["journal"])
    assert (told["snapshots"], told["snapshot_bytes"], told["failed"]) == (0, 0, "")
    monkeypatch.delenv("RAYSTORE_FAILPOINTS")
    await until_made(store, path, newest(path))
    assert present((await store.statistics())["journal"])["snapshots"] == 1
    assert digest(read_run(path).state) == digest(store._service.state)
    store.close()


@pytest.mark.parametrize(
    "script, why",
    [
        ("", "said nothing of a snapshot"),
        ("print('no JSON')", "said nothing of a snapshot"),
        ("print('[]')", "said nothing of a snapshot"),
        ("import os; os.abort()", "SIGABRT"),
        ("raise SystemExit(4)", "code 4"),
        ("print('{\"bytes\": 7}')", "there is none"),
        ("print('{\"bytes\": 7}'); raise SystemExit(2)", "code 2"),
        ('print(\'{"error": "no room"}\'); raise SystemExit(1)', "no room"),
    ],
)
async def test_what_a_helper_says_is_believed_only_with_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, script: str, why: str
) -> None:
    """Whatever it ends with: a failure is told, and counts as none made."""
    path = tmp_path / "j"
    python = tmp_path / "python"  # in the place of the interpreter that runs the helper
    python.write_text(f"#!{sys.executable}\n{script}\n")
    python.chmod(0o755)
    store = store_of(path)
    monkeypatch.setattr(sys, "executable", str(python))
    for _ in range(40):
        await work(store, 40)
        await until_idle(store)
        if why in caplog.text:
            break
    assert f"no snapshot was made ({'' if why == 'no room' else 'the helper'}" in caplog.text and why in caplog.text
    assert snapshotter_of(store).snapshots_made == 0 and snapshotter_of(store).last == {} and newest(path) == (0, 0)
    store.close()


async def until_made(store: rs.InMemoryLightningStore, path: Path, before: tuple[int, int]) -> list[str]:
    """Work until another snapshot is there; ids of the rollouts."""
    made: list[str] = []
    for _ in range(40):
        if newest(path) > before:
            return made
        made += await work(store, 100)
        await until_idle(store)
    raise AssertionError("no snapshot was made")


async def test_a_state_that_differs_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A replay that does not find what the writer found is an alarm, and the evidence stays."""
    path = tmp_path / "j"
    monkeypatch.setattr(compaction, "verify", lambda state, count: (verify(state, count), "another")[1])
    store = store_of(path)
    await work(store, 200)
    await until(lambda: "differs" in caplog.text, "nobody noticed")
    assert snapshotter_of(store).failed
    assert not Directory(path).segments(SNAPSHOT)
    store.close()
    found = read_run(path)
    assert found.differences
    assert digest(found.state) == digest(store._service.state)


async def test_a_helper_of_an_earlier_writer_finishes_what_it_began(tmp_path: Path) -> None:
    """What it read was closed before anybody else began, so the state of the later writer can begin with it."""
    path = tmp_path / "j"
    store = store_of(path)
    made = await work(store, 20)
    store.close()
    later = store_of(path)
    made += await work(later, 20)
    before = digest(later._service.state)
    directory = Directory(path)
    (first, second) = directory.segments()
    told = compaction.compact(directory, *first[:2])
    assert told["operations"] > 20
    assert [found[:2] for found in directory.segments(SNAPSHOT)] == [first[:2]]
    assert directory.segments() == [second]
    assert digest(read_run(path).state) == before == digest(later._service.state)
    assert len(await later.query_spans(made[3])) == len(await later.query_spans(made[33])) == 2
    later.close()
    again = store_of(path)
    assert again._service.state.entries.keys() == set(made)
    again.close()


WITH_A_HELPER = """
import asyncio, sys
from tests.journal import test_compaction as tests
from raystore.journal import compaction
compaction.OPERATIONS = compaction.VERIFY_LAG = 100
async def main():
    store = tests.store_of(sys.argv[1])
    while tests.snapshotter_of(store)._helper is None:
        await tests.work(store, 10)
    print(tests.snapshotter_of(store)._helper.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


async def test_a_helper_outlives_the_store_that_began_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were each to die with its store, one that is killed over and over would never have a snapshot."""
    monkeypatch.setattr(compaction, "OPERATIONS", 10**9)
    path = tmp_path / "j"
    command = [sys.executable, "-c", WITH_A_HELPER, str(path)]
    slow = {"RAYSTORE_FAILPOINTS": "snapshot.written=sleep:3"}  # which only helpers come to
    killed = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, env=os.environ | slow | {"PYTHONPATH": os.getcwd()}, start_new_session=True
    )
    assert killed.stdout is not None
    helper = int(await killed.stdout.readline())
    session = os.getsid(helper)
    os.killpg(killed.pid, signal.SIGKILL)  # as Ray ends what is left of a worker
    await killed.wait()
    assert session == killed.pid, "Linux counts it apart, and being nice has no effect"
    store = store_of(path)
    before = digest(store._service.state)
    directory = Directory(path)
    assert not directory.segments(SNAPSHOT), "it was too fast to show anything"
    await until(lambda: directory.segments(SNAPSHOT), "the helper died with its store")
    assert digest(read_run(path).state) == before
    assert snapshotter_of(store).snapshots_made == 0
    store.close()


async def test_helpers_work_one_after_another(tmp_path: Path) -> None:
    """A second one is told to come later; one that is late finds that there is nothing to do."""
    path = tmp_path / "j"
    for _ in range(3):
        store = store_of(path)
        await work(store, 20)
        store.close()
    directory = Directory(path)
    places = [found[:2] for found in directory.segments()]
    with compaction._only_helper(directory), pytest.raises(BlockingIOError, match="another helper"):
        compaction.compact(directory, *places[0])
    compaction.compact(directory, *places[1])
    files = sorted(path.iterdir())
    assert compaction.compact(directory, *places[0])["seconds"] == 0.0
    assert sorted(path.iterdir()) == files
    left = directory.segment(*places[0], SNAPSHOT)  # of a helper that died before it could remove it
    left.write_bytes(b"old")
    (path / f"{left.name}.1.new").write_bytes(b"unfinished")
    compaction.compact(directory, *places[2])
    assert [found[:2] for found in directory.segments(SNAPSHOT)] == [places[2]]
    assert not directory.segments() and not list(path.glob("*.new"))


async def test_a_reading_begins_anew_if_files_are_replaced_while_it_lists_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot that it did not see, and segments that it no longer sees, would look like damage."""
    path = tmp_path / "j"
    store = store_of(path)
    await work(store, 20)
    store.close()
    directory = Directory(path)
    before = digest(read_run(path).state)
    (found,) = directory.segments()
    list_them = Directory.segments
    asked = []

    def replaced_meanwhile(self: Directory, *kinds: str) -> list[JournalFile]:
        listed = list_them(self, *kinds)
        asked.append(kinds)
        if len(asked) == 2:  # of the check whether anything is there, then of the snapshots
            compaction.compact(directory, *found[:2])
        return listed

    monkeypatch.setattr(Directory, "segments", replaced_meanwhile)
    assert digest(read_run(path).state) == before
    assert asked[1] == (SNAPSHOT,)


async def test_a_torn_snapshot_is_refused(tmp_path: Path) -> None:
    """A snapshot that cannot be read is damage, wherever it is."""
    path = tmp_path / "j"
    store = store_of(path)
    await work(store, 200)
    await until_snapshot(store, path)
    store.close()
    ((_, _, file),) = Directory(path).segments(SNAPSHOT)
    whole = file.read_bytes()
    sections = whole.rindex(b"plain")
    for at in (0, 20, sections, sections + 100, len(whole) - 30, len(whole) - 3):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises((rs.JournalDamagedError, rs.JournalFormatError)):
            read_run(path)
    for length in (0, 10, sections, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(rs.JournalDamagedError):
            read_run(path)
    file.write_bytes(whole)
    read_run(path)


async def test_a_journal_of_many_processes_is_compacted(tmp_path: Path) -> None:
    """Each process goes on with the snapshot of another, and makes its own."""
    path = tmp_path / "j"
    made: list[str] = []
    for _ in range(5):
        store = store_of(path)
        assert store._service.state.entries.keys() == set(made)
        made += await work(store, 120)
        made += await until_made(store, path, (store.info.epoch, 0))
        await until_idle(store)
        store.close()
    assert newest(path)[0] == store.info.epoch
    store = store_of(path)
    assert_replaced(path)
    assert {r.rollout_id for r in await store.query_rollouts()} == set(made)
    spans = await store.query_many_spans(made, attempt_id=None)
    assert sum(map(len, spans.values())) == 2 * len(made)
    assert all(span.attributes["body"] for of_one in spans.values() for span in of_one)
    store.close()


async def test_what_else_a_helper_prints_is_not_taken_for_its_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A customized Python that greets, and one that says good-bye."""
    (tmp_path / "sitecustomize.py").write_text("import atexit; print('hello'); atexit.register(print, 'good-bye')")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "j"
    store = store_of(path)
    await until_made(store, path, newest(path))
    await until_idle(store)
    assert not snapshotter_of(store)._failures and snapshotter_of(store).snapshots_made == 1
    assert_replaced(path)
    store.close()


def test_the_helper_is_a_command(tmp_path: Path) -> None:
    """It says what is wrong, and ends with a code that tells."""
    told = subprocess.run(
        [sys.executable, "-m", "raystore.journal.compaction", str(tmp_path / "none"), "1", "1"],
        capture_output=True, text=True, env=os.environ, check=False,
    )  # fmt: skip
    assert told.returncode == 1
    assert "error" in told.stdout
