"""What is on disk: frames, segments, epochs; torn tails are cut and told, damage is refused, writers are fenced."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from raystore.core.state import Step
from raystore.errors import FencedError, JournalDamagedError, JournalFormatError, JournalFullError, StoreError
from raystore.journal import format, writer
from raystore.journal.files import Directory
from raystore.journal.reader import JournalReader
from raystore.journal.writer import JournalWriter


def start_record(after: tuple[int, int, int, int] = (0, 0, 0, 0)) -> list[bytes]:
    """What begins an epoch."""
    return [format.pack_record_head(format.START, Step(1.0, 1.0), 0, None, [{"store_id": "s"}, {}, list(after)])]


def write(
    directory: Directory,
    count: int,
    *,
    epoch: int | None = None,
    first: int = 1,
    after: tuple[int, int, int, int] = (0, 0, 0, 0),
    each: int = 1,
    durability: str = "power",
    size: int = 40,
) -> Any:
    """A writer's records, `each` in a group; the writer is closed."""
    epoch = directory.begin_epoch() if epoch is None else epoch
    made = JournalWriter(directory, store_id="s", epoch=epoch, first=first, durability=durability)
    made.append(start_record(after))
    for number in range(1, count):
        made.append([b"head", b"%06d" % number, bytes(size)])
        if number % each == 0:
            wait(made)
    wait(made)
    made.close()
    return epoch


def wait(made: JournalWriter, number: Any = None) -> None:
    """Until a record may be relied on."""
    done = threading.Event()
    failed = []

    def told(error: Any) -> None:
        failed.append(error)
        done.set()

    if made.when_durable(made.last if number is None else number, told):
        assert done.wait(10)
        if failed[0] is not None:
            raise failed[0]


def bodies(directory: Directory, epoch: int | None = None) -> list[bytes]:
    """The second chunk of each record but those that begin an epoch."""
    return [bytes(record[1]) for _, record in JournalReader(directory, epoch) if len(record) > 1]


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    """An empty journal."""
    made = Directory(tmp_path / "journal")
    made.path.mkdir()
    return made


def test_what_is_written_is_read(directory: Directory) -> None:
    """In order, over segments, in groups of any size."""
    write(directory, 500, each=7)
    assert bodies(directory) == [b"%06d" % n for n in range(1, 500)]


def test_segments_follow_each_other(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long journal is many files; what is behind the last frame of one is nothing."""
    monkeypatch.setattr(writer, "SEGMENT_BYTES", 4_000)
    write(directory, 300)
    assert len(directory.segments()) > 5
    reading = JournalReader(directory)
    assert len(list(reading)) == 300
    assert reading.torn_tails == []


def test_a_newer_format_is_refused_by_name(directory: Directory) -> None:
    """What a later raystore wrote is not guessed at."""
    write(directory, 3)
    path = directory.segments()[0][2]
    newer = b"%d " % (format.FORMAT + 1)
    path.write_bytes(path.read_bytes().replace(b"journal %d " % format.FORMAT, b"journal " + newer, 1))
    with pytest.raises(JournalFormatError, match=f"format {format.FORMAT + 1}"):
        bodies(directory)


def test_a_missing_segment_is_found(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle, and one that a later writer has read."""
    monkeypatch.setattr(writer, "SEGMENT_BYTES", 2_000)
    write(directory, 100)
    segments = directory.segments()
    middle = segments[len(segments) // 2][2]
    middle.rename(middle.with_suffix(".gone"))
    with pytest.raises(JournalDamagedError, match="is next"):
        bodies(directory)


def test_a_writer_stops_before_its_answers_leave_once_there_is_a_newer_one(directory: Directory) -> None:
    """What it commits after that was acknowledged by nobody, and is read by nobody."""
    first = directory.begin_epoch()
    old = JournalWriter(directory, store_id="s", epoch=first, first=1, durability="power")
    failures: list[StoreError] = []
    old.when_failed(failures.append)
    old.append(start_record())
    old.append([b"head", b"acknowledged"])
    wait(old)
    second = directory.begin_epoch()
    reading = JournalReader(directory, second)
    assert [bytes(record[1]) for _, record in reading if len(record) > 1] == [b"acknowledged"]
    old.append([b"head", b"too late"])
    with pytest.raises(FencedError):
        wait(old)
    assert [type(error) for error in failures] == [FencedError]
    after = astuple(reading.position)
    write(directory, 3, epoch=second, first=reading.position.record + 1, after=after)
    assert bodies(directory) == [b"acknowledged", b"000001", b"000002"]


def test_an_idle_writer_ends_within_three_seconds(directory: Directory) -> None:
    """It looks every second whether there is a newer one."""
    old = JournalWriter(directory, store_id="s", epoch=directory.begin_epoch(), first=1, durability="power")
    ended = threading.Event()
    old.when_failed(lambda error: ended.set())
    old.append(start_record())
    wait(old)
    started = time.monotonic()
    directory.begin_epoch()
    assert ended.wait(3)
    assert time.monotonic() - started < 3


def test_an_epoch_that_never_began_is_passed_over(directory: Directory) -> None:
    """A process that died before its first record was on disk has acknowledged nothing."""
    write(directory, 5)
    torn = directory.begin_epoch()
    head = format.pack_head(format.FileHead("s", torn, 1, 6))
    directory.segment(torn, 1).write_bytes(head + b"\xf5JF\n and no more")
    third = directory.begin_epoch()
    assert len(bodies(directory, third)) == 4


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB; needs the right to mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount a file system: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_a_full_disk_refuses_changes_and_takes_them_again(small_disk: Path) -> None:
    """Before anything was changed; what was accepted before is committed; with space again it goes on by itself."""
    directory = Directory(small_disk / "journal")
    made = JournalWriter(directory, store_id="s", epoch=directory.begin_epoch(), first=1, durability="power")
    made.append(start_record())
    filler = small_disk / "filler"
    with open(filler, "wb") as file:
        left = os.statvfs(small_disk)
        file.write(bytes(left.f_bavail * left.f_frsize))
    taken = 0
    with pytest.raises(JournalFullError, match="full"):
        while True:
            made.reserve(100_000)
            made.append([b"head", bytes(100_000)])
            taken += 1
    wait(made)
    assert 20 < taken < 45
    filler.unlink()
    time.sleep(writer.FULL_SECONDS)
    made.reserve(100_000)
    made.append([b"head", b"with space again"])
    wait(made)
    made.close()
    assert bodies(directory)[-1] == b"with space again"
    assert len(bodies(directory)) == taken + 1


def test_a_copy_of_a_journal_is_a_journal(directory: Directory, tmp_path: Path) -> None:
    """Nothing in it depends on where it is."""
    write(directory, 50)
    shutil.copytree(directory.path, tmp_path / "copy")
    assert bodies(Directory(tmp_path / "copy")) == bodies(directory)


def test_a_writer_that_dies_while_it_makes_a_segment_leaves_a_journal(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any moment of it: the next one goes on, and tidies up."""
    write(directory, 5)
    for call in ("posix_fallocate", "pwrite", "fsync", "rename"):

        def die(*_: Any, call: str = call) -> None:
            raise KeyboardInterrupt(call)

        epoch = directory.begin_epoch()
        with monkeypatch.context() as patch:
            patch.setattr(Path if call == "rename" else os, call, die)
            with pytest.raises(KeyboardInterrupt, match=call):
                JournalWriter(directory, store_id="s", epoch=epoch, first=6, durability="power")
        assert len(bodies(directory)) == 4
    assert list(directory.path.glob("*.new"))
    directory.begin_epoch()
    assert list(directory.path.glob("*.new")) == []


def test_a_reader_is_not_hurt_by_a_writer_that_goes_on(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments lose the space they did not need while somebody reads them."""
    monkeypatch.setattr(writer, "SEGMENT_BYTES", 20_000)
    made = JournalWriter(directory, store_id="s", epoch=directory.begin_epoch(), first=1, durability="power")
    made.append(start_record())
    for number in range(1, 400):
        made.append([b"head", b"%06d" % number, bytes(200)])
        if number % 20 == 0:
            wait(made)
            reading = JournalReader(directory)
            found = iter(reading)
            next(found)
            made.append([b"head", b"%06d" % 0, bytes(30_000)])
            wait(made)
            assert len(list(found)) >= number
    made.close()


def test_what_was_let_in_before_a_rotation_has_its_place(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotation on a disk that is nearly full does not break off what waits."""
    monkeypatch.setattr(writer, "SEGMENT_BYTES", 1_000_000)
    directory = Directory(small_disk / "journal")
    made = JournalWriter(directory, store_id="s", epoch=directory.begin_epoch(), first=1, durability="power")
    made.append(start_record())
    taken = 0
    with pytest.raises(JournalFullError):
        while True:
            made.reserve(150_000)
            made.append([b"head", b"%06d" % taken, bytes(150_000)])
            taken += 1
    wait(made)
    made.close()
    assert [int(body) for body in bodies(directory)] == list(range(taken))
