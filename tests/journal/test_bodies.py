"""Bodies of spans are read from the disk through a few open files, however many a journal has."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path
from typing import Any

import pytest

import raystore as rs
from raystore.journal import compaction, span_bodies, writer
from raystore.journal.files import BODIES, RECORDS, Directory, JournalFile
from tests.helpers import make_span, present
from tests.journal.test_compaction import newest, snapshotter_of, until_snapshot


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of a few records, indexes of a few frames, and a snapshot only when a test asks for one."""
    monkeypatch.setattr(writer, "SEGMENT_BYTES", 3_000)
    monkeypatch.setattr(span_bodies, "SPARSE_BYTES", 500)
    monkeypatch.setattr(compaction, "OPERATIONS", 10**9)
    monkeypatch.setattr(compaction, "SEGMENT_BYTES", 10**12)


def store_of(path: Path, **options: Any) -> rs.InMemoryLightningStore:
    return rs.InMemoryLightningStore(journal=path, durability="process", **options)


async def record(store: rs.InMemoryLightningStore, numbers: range) -> dict[int, str]:
    """A rollout with three spans for each number; their ids."""
    made: dict[int, str] = {}
    for number in numbers:
        rollout = await store.start_rollout(number)
        spans = [make_span(rollout, n, attributes={"body": f"{number}/{n}" * 30}) for n in (1, 2, 3)]
        await store.add_many_spans(spans[:2])
        await store.add_span(spans[2])
        await store.update_attempt(rollout.rollout_id, "latest", status="succeeded")
        made[number] = rollout.rollout_id
    return made


async def read(store: rs.InMemoryLightningStore, made: dict[int, str], numbers: list[int]) -> None:
    """Read the spans of these, and compare."""
    for number in numbers:
        found = await store.query_spans(made[number])
        assert [span.attributes["body"] for span in found] == [f"{number}/{n}" * 30 for n in (1, 2, 3)], number


def open_files(path: Path) -> int:
    """How many files of records this process has open for reading."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            name = os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)")
            if name.startswith(str(path)) and name.endswith((RECORDS, BODIES)):
                flags = Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0]
                found += [name] if int(flags, 8) & os.O_ACCMODE == os.O_RDONLY else []
    return len(found)


def evict(store: rs.InMemoryLightningStore) -> None:
    """Let every body be on disk only."""
    state = store._service.state
    state.spans.written = present(store._service._recorder).writer.durable
    for rollout_id in list(state.entries):
        if state.spans.has(rollout_id):
            state.spans.evict(rollout_id)


async def test_few_files_are_open_and_few_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of hundreds of segments: all bodies in any order, and the directory is not listed for each."""
    path = tmp_path / "j"
    with store_of(path) as store:
        made = await record(store, range(150))
    listed, before = [], Directory.segments

    def segments(directory: Directory, *kinds: str) -> list[JournalFile]:
        listed.append(kinds)
        return before(directory, *kinds)

    monkeypatch.setattr(Directory, "segments", segments)
    with store_of(path) as store:
        assert len(before(Directory(path), RECORDS)) > 3 * span_bodies.FILES_OPEN
        listed.clear()
        await read(store, made, [75])
        assert open_files(path) <= 3, "three records are in at most three files"
        for number in [*range(150), *random.Random(1).sample(range(150), 150)]:
            await read(store, made, [number])
            assert open_files(path) <= span_bodies.FILES_OPEN
        assert len(listed) == 1
    assert open_files(path) == 0


async def test_bodies_are_found_while_the_writer_goes_on_and_helpers_replace_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In new segments, in those that a helper renamed, copied or dropped, and those of another process."""
    path, dice, made = tmp_path / "j", random.Random(2), dict[int, str]()
    for round_ in range(2):
        with store_of(path) as store:
            for part in range(2):
                number = 1_000 * round_ + 100 * part
                made |= await record(store, range(number, number + 20))
                evict(store)
                await read(store, made, dice.sample(sorted(made), 10))
                assert open_files(path) <= span_bodies.FILES_OPEN
            gone = dice.sample(sorted(made), 15)
            await store.delete_rollouts([made.pop(number) for number in gone])
            before = newest(path)
            monkeypatch.setattr(compaction, "SEGMENT_BYTES", 1)
            made |= await record(store, range(1_000 * round_ + 500, 1_000 * round_ + 510))
            while snapshotter_of(store)._thread:
                await read(store, made, dice.sample(sorted(made), 3))
            monkeypatch.setattr(compaction, "SEGMENT_BYTES", 10**12)
            await until_snapshot(store, path, before)
            evict(store)
            await read(store, made, dice.sample(sorted(made), len(made)))
            assert open_files(path) <= span_bodies.FILES_OPEN
        assert open_files(path) == 0
    assert Directory(path).segments(BODIES)
