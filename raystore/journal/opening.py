"""Opening a journal: to write it, as a new run or going on with the run that is there; or to read it."""

from __future__ import annotations

import logging
import secrets
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from raystore.core import expiry, format1, training
from raystore.core.state import Settings, State, Step
from raystore.errors import (
    FencedError,
    InvalidValueError,
    JournalFullError,
    JournalHeldError,
    JournalInUseError,
    JournalMissingError,
    StoreError,
)
from raystore.journal import format
from raystore.journal.compaction import Snapshotter, upgrade
from raystore.journal.failpoints import failpoint
from raystore.journal.files import RECORDS, SNAPSHOT, Directory, JournalPosition
from raystore.journal.format import WriterInfo
from raystore.journal.reader import CrashMarker, JournalReader, ReadingProgress, retry_on_replacement
from raystore.journal.recorder import Recorder
from raystore.journal.replay import Replay, replay
from raystore.journal.span_bodies import SpanBodies
from raystore.journal.writer import FULL_SECONDS, JournalWriter, is_full
from raystore.reports.log import logger_of
from raystore.types.options import StoreConfig

logger: logging.Logger = logger_of("raystore.store")

HOLD_AFTER = 2  #: processes that die at the same record; the next one serves the state before it, and takes no changes


@dataclass(slots=True)
class Opened:
    """A journal that was opened, and the state to go on from."""

    state: State
    directory: Directory
    recorder: Recorder | None  # None: for reading only
    store_id: str
    epoch: int
    not_before: float  # time of the newest record; the clock goes on from there
    remarks: list[str]
    bodies: SpanBodies
    snapshotter: Snapshotter | None = None
    held: StoreError | None = None  # why no changes are taken


def open_journal(
    config: StoreConfig,
    settings: Settings,
    *,
    name: str | None,
    resume: str,
    now: float,
    writer: str | None = None,
    progress: ReadingProgress | None = None,
) -> Opened:
    """Become the writer of a store's journal.

    `resume`: "auto" goes on with the run that is there, if it is of this store, and begins one if there is none; "must"
    goes on, with whatever run, also if its writer seems alive; "never" begins one where there is none; "again" is for
    a process that takes the place of another of the same `writer`, which must find its run, and no other writer since.
    `now` is the wall clock, in seconds. `progress` shows other threads how far a long reading has come.
    """
    assert config.journal is not None
    directory = checked_directory(config.journal)
    _check_resume(directory, name, resume, writer)
    try:
        _make(directory)
        epoch = directory.begin_epoch()
        failpoint("opening.epoch")
        marker = CrashMarker(directory.path)
        if marker.deaths >= HOLD_AFTER and resume != "must":
            return _hold(directory, epoch, settings, marker, progress)
        reader, replayed = _read(directory, epoch, marker, progress)
        marker.clear()
        failpoint("opening.read")
        reader.sync()  # of a process that died, the last records may be in the system's memory only
        if reader.is_old and replayed.writer:
            upgrade(directory, replayed, reader.position)
        info = WriterInfo(
            store_id=replayed.writer.get("store_id") or secrets.token_hex(8),
            name=name if name is not None else replayed.writer.get("name"),
            writer=writer,
        )
        differences = [
            f"a replay differs from what the store was at record {number}" for number in replayed.differences
        ]
        remarks = reader.torn_tails + differences
        for remark in remarks:
            logger.warning("Journal %s: %s", directory.path, remark)
        bodies = SpanBodies(directory)
        snapshotter = Snapshotter(
            directory, epoch, replayed.operations, bodies.forget_files,
            failed=differences[-1] if differences else "",  # the evidence is kept
        )  # fmt: skip
        journal_writer = JournalWriter(
            directory, store_id=info["store_id"], epoch=epoch, first=reader.position.record + 1,
            durability=config.durability, on_segment_closed=snapshotter.segment_closed,
        )  # fmt: skip
        resume_writing(replayed, journal_writer, settings, info=info, after=reader.position, now=now)
    except OSError as error:
        if is_full(error):
            raise JournalFullError(str(directory.path), FULL_SECONDS) from None
        raise
    return Opened(
        replayed.state, directory, Recorder(journal_writer), info["store_id"], epoch, replayed.now,
        remarks, bodies, snapshotter,
    )  # fmt: skip


def checked_directory(path: str | Path, *, to_write: bool = True) -> Directory:
    """The directory of a journal; raises `InvalidValueError` if this process cannot use the path, and says why."""
    directory = Directory(path)
    if (expected := directory.why_unusable(to_write=to_write)) is not None:
        raise InvalidValueError("journal", str(directory.path), expected)
    return directory


def _make(directory: Directory) -> None:
    try:
        directory.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_full(error):
            raise
        expected = f"a directory that is there, or can be made ({error.strerror}); name another"
        raise InvalidValueError("journal", str(directory.path), expected) from None


def _read(
    directory: Directory, epoch: int, marker: CrashMarker, progress: ReadingProgress | None, stop_at: int | None = None
) -> tuple[JournalReader, Replay]:
    """Replay what the writers of earlier epochs wrote, or only up to the record before `stop_at`."""

    def read() -> tuple[JournalReader, Replay]:
        reader = JournalReader(directory, epoch)
        if stop_at is not None and reader.position.record == stop_at:
            raise JournalHeldError(str(directory.path), stop_at, marker.deaths)
        with progress or ReadingProgress(is_shown=True) as shown:
            return reader, replay(reader, before=marker.mark, stop_at=stop_at, progress=shown)

    try:
        return retry_on_replacement(read)
    except StoreError:
        marker.clear()
        raise


def _hold(
    directory: Directory, epoch: int, settings: Settings, marker: CrashMarker, progress: ReadingProgress | None
) -> Opened:
    """Open a journal in which one record has ended several processes: read-only, with the state before that record."""
    _, replayed = _read(directory, epoch, marker, progress, stop_at=marker.died_at)
    held = JournalHeldError(str(directory.path), marker.died_at, marker.deaths)
    logger.critical("%s", held)
    marker.mark(marker.died_at)
    opened = _read_only(directory, epoch, replayed, held)
    training.configure(opened.state, settings)
    return opened


def _read_only(directory: Directory, epoch: int, replayed: Replay, held: StoreError | None = None) -> Opened:
    replayed.state.guard_all()
    format1.go_on(replayed.state)
    return Opened(
        replayed.state, directory, None, replayed.writer["store_id"], epoch, replayed.now,
        [] if held is None else [str(held)], SpanBodies(directory), held=held,
    )  # fmt: skip


def resume_writing(
    replayed: Replay, writer: JournalWriter, settings: Settings, *, info: WriterInfo, after: JournalPosition, now: float
) -> None:
    """Append a START record, and make the replayed state ready to go on, with these settings."""
    state = replayed.state
    now = max(now, replayed.now)
    step = Step(now, now)
    away = step.now - replayed.now if replayed.writer else None
    recorded = asdict(settings) | {"default_config": settings.default_config.row()}
    start: list[Any] = [info, recorded, astuple(after), away]
    writer.append([format.pack_record_head(format.START, step, 0, None, start)])
    format1.go_on(state)
    training.configure(state, settings)
    if away is not None:
        expiry.resume(state, step, away)
    state.spans.keeps_bodies = True


def _check_resume(directory: Directory, name: str | None, resume: str, writer: str | None) -> None:
    """Refuse a journal that `resume` does not allow, before its writer is fenced."""
    path = str(directory.path)
    is_there = bool(directory.segments(RECORDS, SNAPSHOT))
    if resume == "never" and is_there:
        raise JournalInUseError(path, "it holds a run, and resume='never' asks for a new one; take an empty directory")
    if resume == "must" and not is_there:
        raise JournalMissingError(path, "resume='must' asks for a run")
    if resume == "again" and not is_there:
        raise JournalMissingError(path, "this store wrote one before it was restarted, perhaps on another node")
    if resume == "auto" and (running := directory.running_writer()) is not None:
        raise JournalInUseError(path, f"a running store writes it ({running}). Connect to that store, or end it first")
    earlier = retry_on_replacement(lambda: JournalReader(directory).writer)
    if resume == "again" and earlier and earlier.get("writer") != writer:
        raise FencedError(path, max(directory.epochs()))
    theirs = earlier.get("name")
    if resume == "auto" and name is not None and theirs is not None and theirs != name:
        raise JournalInUseError(
            path,
            f"it holds the run of store {theirs!r}, and this is {name!r}. Start that one, or take another directory; "
            "resume='must' goes on with it under this name",
        )


def read_run(path: str | Path) -> Replay:
    """The state that a journal holds, without becoming its writer."""
    directory = checked_directory(path, to_write=False)
    if not directory.segments(RECORDS, SNAPSHOT):
        raise JournalMissingError(str(directory.path), "there are no segments")
    with ReadingProgress(is_shown=True) as shown:
        return retry_on_replacement(lambda: replay(JournalReader(directory), progress=shown))


def open_for_reading(path: str | Path) -> Opened:
    """Open a journal for reading; its writer is not disturbed."""
    replayed, directory = read_run(path), Directory(path)
    return _read_only(directory, max(directory.epochs(), default=0), replayed)
