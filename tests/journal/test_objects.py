"""Objects of resources in a journal: their files, what becomes of them, and who may read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import raystore as rs
from raystore.core.payload import Payload
from raystore.journal.files import OBJECTS, Directory, JournalObjects
from raystore.values.objects import Kept, ObjectFiles, Origin, Parts, Source, address_of, pickled, unpickled
from tests.helpers import present


def whole(parts: Parts) -> bytes:
    """An object as one piece of bytes."""
    return b"".join(bytes(memoryview(part).cast("B")) for part in parts)


@pytest.fixture
def files(tmp_path: Path) -> ObjectFiles:
    """The files of a journal's objects."""
    return ObjectFiles(tmp_path)


def test_an_object_comes_back_as_it_was(files: ObjectFiles) -> None:
    """Arrays of any order beside plain values; what is the same has one file."""
    value = {"a": np.arange(1000.0), "f": np.ones((3, 4), order="F"), "rest": [1, "x", None]}
    parts = present(pickled(value))
    address = address_of(parts)
    assert address == address_of([whole(parts)])
    files.write(address, parts)
    files.write(address, parts)
    assert [path.name for path in files.path.iterdir()] == [address]
    found = unpickled(files.read(address))
    assert (found["a"] == value["a"]).all() and found["f"].flags.f_contiguous and found["rest"] == value["rest"]
    assert not found["a"].flags.writeable and found["a"].flags.aligned


def test_an_object_that_comes_in_pieces_is_whole_or_not_there(files: ObjectFiles) -> None:
    """Pieces in order make the file; a gap, or other bytes, are noticed."""
    data = whole(present(pickled(np.arange(5000.0))))
    address = address_of([data])
    cuts = range(0, len(data), 10_000)
    for at in cuts:
        assert not files.has(address)
        files.write_piece("ab12", address, at, len(data), data[at : at + 10_000])
    assert files.read(address) == data
    other = address_of([b"other"])
    with pytest.raises(ValueError, match="did not arrive whole"):
        files.write_piece("ab12", other, 0, 5, b"otter")
    assert [path.name for path in files.path.iterdir()] == [address]
    with pytest.raises(FileNotFoundError):
        files.read_piece(other, 0)


@pytest.mark.parametrize("address", ["../../etc/passwd", "", "a" * 39, "/" * 40, "é" * 40])
def test_only_addresses_name_files(files: ObjectFiles, address: Any) -> None:
    """Whatever a peer says, nothing outside of the directory is read or written."""
    with pytest.raises(ValueError, match="no address"):
        files.read_piece(address, 0)
    with pytest.raises(ValueError, match="no address"):
        files.write_piece("ab", address, 0, 1, b"x")


def test_a_damaged_file_is_not_taken_for_an_object(files: ObjectFiles) -> None:
    """Its digest tells; the error says that it is lost, and of which version."""
    parts = present(pickled(np.arange(1000.0)))
    address = address_of(parts)
    files.write(address, parts)
    source = Source(Kept(address, 8000), Origin(path=str(files.path)), "w", 3)
    assert source.read("gone").sum() == np.arange(1000.0).sum()
    with open(files.path / address, "r+b") as file:
        file.seek(4000)
        file.write(b"\xff" * 8)
    with pytest.raises(rs.PayloadLostError, match="resources w version 3.*damaged") as raised:
        source.read("gone")
    assert raised.value.resources == ("w", 3)


def test_a_reader_sees_the_directory_if_it_finds_the_token(tmp_path: Path) -> None:
    """The same path on another machine has no token, or another one."""
    objects = JournalObjects(Directory(tmp_path), needed=[], bound=100)
    told = objects.description()
    assert told == objects.description() and told["bound"] == 100
    assert Origin(told["path"], told["token"]).files() is not None
    assert Origin(told["path"], "another").files() is None
    assert Origin(str(tmp_path / "elsewhere"), told["token"]).files() is None


def test_what_a_crash_left_is_cleared_away(tmp_path: Path) -> None:
    """Objects that no version refers to, and those that were never finished; nothing else."""
    first = JournalObjects(Directory(tmp_path), needed=[], bound=100)
    token = first.description()["token"]
    needed, orphan = (address_of([data]) for data in (b"needed", b"orphan"))
    for address in (needed, orphan):
        (tmp_path / OBJECTS / address).write_bytes(b"x")
    (tmp_path / OBJECTS / f"{needed}.12.new").write_bytes(b"x")
    second = JournalObjects(Directory(tmp_path), needed=[needed], bound=100)
    assert sorted(path.name for path in (tmp_path / OBJECTS).iterdir()) == sorted([needed, "token"])
    assert second.description()["token"] == token


async def publish(store: rs.InMemoryLightningStore, address: str) -> Any:
    """A version that refers to an object of the journal, as a client on Ray makes it."""
    call = {"resources_id": "w", "resources": Payload(b"\x02x", ("reference",)), "policy_version": None}
    return await store._transport.call("put_resources", call | {"holds_objects": True, "objects": [(address, 6)]})


async def test_files_go_once_no_version_refers_to_them(tmp_path: Path) -> None:
    """Two versions of the same object keep it; the file of a superseded one goes when that is durable."""
    store = rs.InMemoryLightningStore(journal=tmp_path)
    files = present(store._service.objects)
    files.description()
    one, two = (address_of([data]) for data in (b"one", b"two"))
    for address in (one, two):
        (tmp_path / OBJECTS / address).write_bytes(b"x")
    await publish(store, one)
    await publish(store, one)
    await store.statistics()
    assert files.files.has(one)
    await publish(store, two)
    await store.statistics()
    await store.statistics()
    assert not files.files.has(one) and files.files.has(two)
    store.close()


async def test_a_restart_holds_back_what_no_file_keeps(tmp_path: Path) -> None:
    """References lead nowhere then; with its file a version is there, without it what waits is held back."""
    address = address_of([b"one"])
    store = rs.InMemoryLightningStore(journal=tmp_path)
    present(store._service.objects).description()
    (tmp_path / OBJECTS / address).write_bytes(b"x")
    await publish(store, address)
    rollout = await store.enqueue_rollout("x")
    store.close()
    store = rs.InMemoryLightningStore(journal=tmp_path)
    assert (await store.statistics())["held_back"] == 0
    store.close()
    (tmp_path / OBJECTS / address).unlink()
    for _ in range(2):  # which is written down, and found again
        store = rs.InMemoryLightningStore(journal=tmp_path)
        assert (await store.statistics())["held_back_by_resources"] == {"w": 1}
        assert await store.dequeue_rollout() is None
        assert "until they are published again" in (await store.story(rollout.rollout_id))[-1]
        await store.check()
        store.close()
    store = rs.InMemoryLightningStore(journal=tmp_path)
    await store.update_resources("w", {})
    assert present(await store.dequeue_rollout()).rollout_id == rollout.rollout_id
    store.close()


async def test_an_object_in_process_survives_a_restart_exactly(tmp_path: Path) -> None:
    """There it travels within the resource, and so it is in the journal."""
    store = rs.InMemoryLightningStore(journal=tmp_path)
    await store.update_resources("w", {"o": rs.ObjectResource(value=np.arange(200_000.0))}, policy_version=3)
    store.close()
    store = rs.InMemoryLightningStore(journal=tmp_path)
    found = present(await store.get_latest_resources()).resources["o"]
    assert isinstance(found, rs.ObjectResource)
    assert (found.get() == np.arange(200_000.0)).all() and (await found.aget()).dtype == np.float64
    store.close()
