"""Rows 9 and 26 to 34 of the fault suite: processes that die at a chosen point, and disks that fail."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import raystore as rs
from raystore.core.snapshot import digest
from raystore.journal import format
from raystore.journal.files import Directory
from raystore.journal.opening import read_run
from raystore.journal.reader import JournalReader
from raystore.journal.writer import JournalWriter
from tests.conftest import SLACK
from tests.faults.busy import __name__ as BUSY
from tests.helpers import present
from tests.journal.test_files import bodies, start_record, wait, write
from tests.journal.test_resume import some_work

ROOT = Path(__file__).parent.parent.parent


def busy(path: Path, seed: int, *, count: int = 40, failpoints: str = "", **environment: Any) -> Any:
    """Let a process work; what it said, and how it ended."""
    chosen = {"RAYSTORE_FAILPOINTS": failpoints} | {name: str(value) for name, value in environment.items()}
    done = subprocess.run(
        [sys.executable, "-m", BUSY, str(path), str(seed), str(count)],
        capture_output=True, text=True, env=os.environ | chosen, cwd=ROOT, timeout=100,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()], done


def is_there(state: Any, kind: Any, *what: Any) -> Any:
    """Whether something that was acknowledged is in a state."""
    if kind == "consumed":
        return all("t" in state.entries[rollout_id].taken for rollout_id in what[0])
    if kind not in ("enqueued", "claimed", "span", "finished"):
        return True
    entry = state.entries.get(what[0])
    if entry is None or kind == "enqueued":
        return entry is not None
    if kind == "claimed":
        return what[1] in [attempt.attempt_id for attempt in entry.attempts]
    if kind == "span":
        return what[2] in [span.span_id for span in state.spans.of(what[0], what[1])]
    return entry.rollout.status == "succeeded"


def missing(state: Any, said: Any) -> list[Any]:
    """What was acknowledged and is not there."""
    return [line for line in said if not is_there(state, *line)]


def doubled(state: Any) -> int:
    """Inputs that are there more than once."""
    inputs = [entry.rollout.input for entry in state.entries.values()]
    return len(inputs) - len(set(inputs))


#: Points at which a writer, a reader or a helper may die, and how often they come by in the work of `busy`.
POINTS = {
    "writer.gathered": 60, "writer.writing": 60, "writer.written": 60, "writer.synced": 60, "writer.not_fenced": 60,
    "writer.durable": 60, "writer.answered": 60, "writer.rotating": 3, "writer.rotated": 3, "writer.truncated": 3,
    "writer.closing": 1, "writer.allocating": 3, "segment.created": 4, "segment.allocated": 4, "segment.synced": 4,
    "segment.named": 4, "segment.there": 4, "opening.epoch": 1, "opening.read": 1, "replay.record": 30,
}  # fmt: skip
OF_HELPERS = {
    "replay.record": 40, "snapshot.written": 1, "snapshot.synced": 1, "snapshot.named": 1, "snapshot.there": 1,
    "segments.dropping": 2, "bodies.written": 1, "bodies.synced": 1, "bodies.named": 1, "segments.dropped": 1,
}  # fmt: skip


@pytest.mark.timeout(900)
def test_a_process_dies_at_a_chosen_point(
    tmp_path: Path, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """At each of them the journal opens again, with everything that was acknowledged, once."""
    lots = random.Random(9)
    died, lost, twice, unopened = 0, 0, 0, 0
    rounds, points = amount(1, 10), dict(list(POINTS.items())[:: amount(3, 1)])
    for point, often in points.items():
        for number in range(rounds):
            path = tmp_path / f"{point}-{number}"
            small: dict[str, Any] = {"SEGMENT_BYTES": 5_000, "SPACE_BYTES": 4_096}
            said = []
            if point in ("opening.read", "replay.record", "opening.epoch"):
                said, _ = busy(path, 1, count=15, **small)
            more, done = busy(path, 2, count=15, failpoints=f"{point}=kill@{lots.randint(1, often)}", **small)
            died += done.returncode == -9
            try:
                state = read_run(path).state if Directory(path).segments() else None
            except rs.JournalError:
                unopened += 1
                continue
            if state is not None:
                lost += len(missing(state, said + more))
                twice += doubled(state)
            elif said or any(kind != "open" for kind, *_ in more):
                lost += 1
    figure = {"died": died, "lost": lost, "doubled": twice, "not to be opened": unopened}
    tried = rounds * len(points)
    met = lost == twice == unopened == 0 and died > tried * 0.8
    report(9, "death at a chosen point, writer and reader", figure=figure, bar="0 lost, 0 doubled, all open", seed=9,
           met=met, did=f"{len(points)} points x {rounds}")  # fmt: skip


@pytest.mark.timeout(900)
def test_a_helper_dies_at_a_chosen_point(
    tmp_path: Path, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """At each of them the journal opens again, and another helper goes on."""
    lots = random.Random(10)
    base = tmp_path / "base"
    said, _ = busy(base, 3, count=60, SEGMENT_BYTES=20_000, SPACE_BYTES=9_000)
    more, _ = busy(base, 4, count=60, SEGMENT_BYTES=20_000, SPACE_BYTES=9_000)
    epoch, number, _ = Directory(base).segments()[-2]
    whole = digest(read_run(base).state)
    died, lost, differing, rounds = 0, 0, 0, amount(1, 10)
    points = dict(list(OF_HELPERS.items())[:: amount(3, 1)])
    for point, often in points.items():
        for round_ in range(rounds):
            path = tmp_path / f"{point}-{round_}"
            shutil.copytree(base, path)
            command = [sys.executable, "-m", "raystore.journal.compaction", str(path), str(epoch), str(number)]
            chosen = {"RAYSTORE_FAILPOINTS": f"{point}=kill@{lots.randint(1, often)}"}
            ended = subprocess.run(command, env=os.environ | chosen, capture_output=True, timeout=60)
            died += ended.returncode == -9
            found = read_run(path).state
            differing += digest(found) != whole
            lost += len(missing(found, said + more))
            again = subprocess.run(command, capture_output=True, timeout=60, text=True)
            differing += again.returncode != 0 or digest(read_run(path).state) != whole
            store = rs.recover(path)
            spans = store.sync.query_many_spans([what[0] for kind, *what in said + more if kind == "span"])
            lost += sum(span.attributes != {"k": "v"} for of_one in spans.values() for span in of_one)
    figure = {"died": died, "lost": lost, "states that differ": differing}
    met = lost == differing == 0 and died >= rounds * (len(points) - 2)
    report(9, "death at a chosen point, helper", figure=figure, bar="0 lost, 0 differ", seed=10,
           met=met, did=f"{len(points)} points x {rounds}")  # fmt: skip


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB; needs the right to mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount a file system: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


async def test_a_full_disk(small_disk: Path, report: Callable[..., None], amount: Callable[[int, int], int]) -> None:
    """Changes are refused by name, reads go on, nothing that was acknowledged is lost, and it goes on by itself."""
    path, rounds = small_disk / "j", amount(3, 40)
    made, resumed = [], []
    store = rs.InMemoryLightningStore(journal=path)
    for _ in range(rounds):
        filler, left = small_disk / "filler", os.statvfs(small_disk)
        filler.write_bytes(bytes(left.f_bavail * left.f_frsize))
        with pytest.raises(rs.JournalFullError):
            while True:
                made.append((await store.enqueue_rollout("x" * 20_000)).rollout_id)
        assert await store.get_rollout_by_id(made[-1]) is not None
        filler.unlink()
        freed = time.monotonic()
        while True:
            try:
                made.append((await store.enqueue_rollout("again")).rollout_id)
                break
            except rs.JournalFullError as full:
                await asyncio.sleep(full.retry_after_seconds)
        resumed.append(time.monotonic() - freed)
        await store.delete_rollouts(made[:-20])
        del made[:-20]
        store.close()  # an emptier directory, since a small disk is soon full of the past
        there = read_run(path).state.entries
        lost = [rollout_id for rollout_id in made if rollout_id not in there]
        assert not lost
        shutil.rmtree(path)
        made = []
        store = rs.InMemoryLightningStore(journal=path)
    store.close()
    figure = {"lost": 0, "goes on after s, at most": round(max(resumed), 2)}
    report(26, "disk full", figure=figure, bar="0 lost, ≤ 1 s", met=max(resumed) <= 1, did=f"{rounds} times")


def test_an_error_of_fsync(tmp_path: Path, report: Callable[..., None], amount: Callable[[int, int], int]) -> None:
    """The process ends, nothing is acknowledged that is not there, and the next one goes on."""
    lots, false, rounds = random.Random(27), 0, amount(2, 60)
    for number in range(rounds):
        path = tmp_path / str(number)
        said, done = busy(path, number, count=15, failpoints=f"writer.written=raise@{lots.randint(2, 40)}")
        assert "closed" not in said[-1] and "could not be written" in done.stderr
        false += len(missing(read_run(path).state, said))
        more, _ = busy(path, 100 + number, count=3)
        assert more[-1] == ["closed"]
    report(27, "fsync returns EIO", figure={"false acknowledgements": false}, bar="0", met=not false, seed=27,
           did=f"{rounds} times (a failpoint, in place of the system call)")  # fmt: skip


async def test_a_slow_disk(
    tmp_path: Path, report: Callable[..., None], amount: Callable[[int, int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop does not stall: reads of what is safe answer at once, changes when the disk has them."""
    delay, figures = 0.2, {}
    fdatasync = os.fdatasync

    def slowly(fd: Any) -> None:
        time.sleep(delay)
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", slowly)
    store = rs.InMemoryLightningStore(journal=tmp_path / "j")
    ticks, acks = [], []

    async def tick() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.005)
            ticks.append(time.monotonic() - before - 0.005)

    async def change(number: int) -> None:
        before = time.monotonic()
        await store.enqueue_rollout(number)
        acks.append(time.monotonic() - before)

    ticking = asyncio.ensure_future(tick())
    for number in range(amount(15, 100)):
        await asyncio.gather(*(change(number) for _ in range(8)))
    ticking.cancel()
    store.close()
    ticks.sort()
    acks.sort()
    figures["loop late ms, p99"] = round(1000 * ticks[int(len(ticks) * 0.99)], 1)
    figures["acknowledged after s, p99"] = round(acks[int(len(acks) * 0.99)], 3)
    late, acknowledged = 10 * SLACK, 2 * delay + 0.05 * SLACK
    met = figures["loop late ms, p99"] <= late and figures["acknowledged after s, p99"] <= acknowledged
    bar = f"≤ {late} ms; ≤ {1000 * acknowledged:.0f} ms"
    report(28, "fsync takes 200 ms", figure=figures, bar=bar, met=met, did=f"{len(acks)} changes")


def test_a_log_cut_anywhere(tmp_path: Path, report: Callable[..., None], amount: Callable[[int, int], int]) -> None:
    """A valid prefix, of which the rest is told, at every length of a file."""
    directory = Directory(tmp_path / "j")
    directory.path.mkdir()
    write(directory, amount(60, 900), each=3)
    (_, _, path), data = directory.segments()[0], directory.segments()[0][2].read_bytes()
    whole, head = bodies(directory), format.unpack_head(data, "x")[1]
    first = present(format.read_frame(memoryview(data), head)).end
    silent = 0
    for length in range(max(first, len(data) - 65_536), len(data) + 1):
        path.write_bytes(data[:length])
        reading = JournalReader(directory)
        found = [bytes(record[1]) for _, record in reading if len(record) > 1]
        is_told = (
            reading.position.offset == length
            or reading.torn_tails
            or not data[reading.position.offset : length].strip(b"\0")
        )
        silent += found != whole[: len(found)] or not is_told
    report(29, "truncated log", figure={"silent differences": silent}, bar="0", met=not silent,
           did=f"cut at {len(data) + 1 - first} places")  # fmt: skip


def test_flipped_bits(tmp_path: Path, report: Callable[..., None], amount: Callable[[int, int], int]) -> None:
    """Every flip is found: refused, or a tail that is told, or nothing that counts."""
    directory = Directory(tmp_path / "j")
    directory.path.mkdir()
    write(directory, 60, each=2)
    path = directory.segments()[0][2]
    data, whole, lots = path.read_bytes(), bodies(directory), random.Random(30)
    undetected, flips = 0, amount(3_000, 100_000)
    for _ in range(flips):
        bit = lots.randrange(len(data) * 8)
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            reading = JournalReader(directory)
            found = [bytes(record[1]) for _, record in reading if len(record) > 1]
            undetected += found != whole and not reading.torn_tails
        except (rs.JournalDamagedError, rs.JournalFormatError):
            pass
    report(
        30, "bit flips", figure={"undetected": undetected}, bar="0", met=not undetected, seed=30, did=f"{flips} flips"
    )


@pytest.mark.parametrize("durability", ["power", "process"])
def test_a_disk_that_forgets(
    tmp_path: Path, report: Callable[..., None], amount: Callable[[int, int], int], durability: str
) -> None:
    """Power is lost: of what was not synced any pages may be there. All that was, is; else a part from the start."""
    directory = Directory(tmp_path / "j")
    made = JournalWriter(directory, store_id="s", epoch=directory.begin_epoch(), first=1, durability=durability)
    made.append(start_record())
    wait(made)
    synced = [(made._offset, 0)]
    for number in range(1, 200):
        made.append([b"head", b"%06d" % number, bytes(random.Random(number).randrange(6_000))])
        if number % 3 == 0:
            wait(made)
            if durability == "power":
                synced.append((made._offset, number))
    wait(made)
    synced.append((made._offset, number))
    made.close()
    path = directory.segments()[0][2]
    data, lots, lost, points = path.read_bytes(), random.Random(31), 0, amount(300, 10_000)
    for _ in range(points):
        index = lots.randrange(len(synced) - 1)
        (offset, number), (until, _) = synced[index : index + 2]  # nothing is written before what is before is synced
        pages = bytearray(data[:until])
        for page in range(offset // 4096 + 1, len(pages) // 4096 + 1):
            if lots.random() < 0.5:
                pages[page * 4096 : (page + 1) * 4096] = bytes(len(pages[page * 4096 : (page + 1) * 4096]))
        path.write_bytes(pages)
        found = [int(bytes(record[1])) for _, record in JournalReader(directory) if len(record) > 1]
        lost += found[:number] != list(range(1, number + 1)) or found != list(range(1, len(found) + 1))
    report(31, f"power loss, durability={durability!r}", figure={"synced and lost, or corrupt": lost}, bar="0",
           met=not lost, seed=31, did=f"{points} points")  # fmt: skip


@pytest.mark.timeout(900)
async def test_a_replay_is_the_state(
    tmp_path: Path, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """After calls of all kinds, drawn by lot, and what time brings."""
    differing, seeds = 0, amount(12, 300)
    for seed in range(seeds):
        path = tmp_path / str(seed)
        store = rs.InMemoryLightningStore(journal=path, clock="manual", durability="process")
        await some_work(store, random.Random(seed), 80)
        store.close()  # writes down that the last claim has arrived, for which nobody waited
        found = read_run(path)
        differing += digest(found.state) != digest(store._service.state) or bool(found.differences)
    report(32, "replay", figure={"states that differ": differing}, bar="0", met=not differing, seed=0,
           did=f"{seeds} seeds of 80 calls")  # fmt: skip


def test_journals_of_all_formats(tmp_path: Path, report: Callable[..., None]) -> None:
    """What an earlier release wrote is opened and goes on; what a later one wrote is refused by name."""
    opened = []
    for archive in sorted((Path(__file__).parent.parent / "journal" / "golden").glob("format-*/*.tar.gz")):
        with tarfile.open(archive) as file:
            file.extractall(tmp_path, filter="data")
        path = tmp_path / archive.name.removesuffix(".tar.gz")
        store = rs.InMemoryLightningStore(journal=path, resume="must")
        assert store.sync.query_rollouts()
        store.close()
        assert digest(read_run(path).state) == digest(store._service.state), path
        opened.append(path.name)
    segment = Directory(path).segments()[-1][2]
    data = segment.read_bytes()
    segment.write_bytes(data.replace(b"raystore journal %d" % format.FORMAT, b"raystore journal 9", 1))
    with pytest.raises(rs.JournalFormatError, match="format 9"):
        read_run(path)
    report(33, "old formats", figure={"opened": len(opened)}, bar="all opened, a newer one refused",
           met=len(opened) >= 16)  # fmt: skip


def test_a_journal_that_is_not_there(tmp_path: Path, report: Callable[..., None]) -> None:
    """A run that should go on does not begin empty."""
    path = tmp_path / "j"
    store = rs.InMemoryLightningStore(journal=path)
    store.sync.enqueue_rollout("x")
    store.close()
    path.rename(tmp_path / "elsewhere")
    empty = 0
    for resume in ("must",):
        try:
            rs.InMemoryLightningStore(journal=path, resume=resume).close()
            empty += 1
        except rs.JournalMissingError:
            pass
    report(34, "journal absent", figure={"silent empty starts": empty}, bar="0", met=not empty,
           did="the actor that Ray restarts: tests/ray/test_restart.py")  # fmt: skip
