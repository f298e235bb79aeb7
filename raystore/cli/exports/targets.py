"""Where an export goes: a file of lines, a trace, Parquet, a collector; and how far it is, so that it can go on.

A target takes rollouts, or groups, one after the other. `commit` makes safe what it has taken, and says in plain data
where it is; the cursor file keeps that together with the place in the store. After a kill the target is brought back
to what the file says: what was written behind it is cut off, so that nothing is there twice. A collector cannot take
anything back; it may get the spans of the last page again, which have the same ids.
Not here: what is exported (`source`), and its forms (the module of each format).
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import json
import os
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from raystore.cli.exports import groups, otlp, parquet, perfetto, records
from raystore.cli.exports.records import to_json
from raystore.cli.exports.source import CHUNK, Whole

VERSION = 1  #: of cursor files
PART_ROWS = 5_000  #: of a file of Parquet
PART_BYTES = 16 * 1024 * 1024  #: ... or so many bytes of JSON; memory is bounded by that
POST_SECONDS = 30.0  #: to wait for a collector
TRIES = 6  #: of a request that a collector cannot take at the moment
BUSY = (429, 502, 503, 504)  #: codes by which it says so


class ExportError(Exception):
    """The export cannot go on; the message says why, and what to do."""


class Target(Protocol):
    """Where an export goes."""

    def begin(self, state: dict[str, Any] | None) -> None:
        """Go on behind `state`, what `commit` said last; None: begin anew."""

    async def take(self, one: Whole) -> None:
        """Take a rollout."""

    async def take_group(self, group: Any, members: Sequence[Whole]) -> None:
        """Take a group."""

    @property
    def is_due(self) -> bool:
        """Whether so much was taken that it is time to commit."""

    async def commit(self) -> dict[str, Any]:
        """Make safe what was taken; where it ends."""

    async def end(self) -> None:
        """Everything was taken and committed."""

    def close(self) -> None:
        """Let go of what is open, whether or not the end was reached."""


# -- files -------------------------------------------------------------------------------------------------------------


class Lines:
    """A file of JSON lines: one for each rollout, or group."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._taken = 0

    def begin(self, state: dict[str, Any] | None) -> None:
        self._file = _opened(self.path, None if state is None else state["bytes"])

    async def take(self, one: Whole) -> None:
        self._write(to_json(records.row(one)) + "\n")

    async def take_group(self, group: Any, members: Sequence[Whole]) -> None:
        self._write(to_json(groups.row(group, members)) + "\n")

    def _write(self, line: str) -> None:
        assert self._file is not None
        self._file.write(line.encode())
        self._taken += 1

    @property
    def is_due(self) -> bool:
        return self._taken > 0

    async def commit(self) -> dict[str, Any]:
        self._taken = 0
        return {"bytes": _synced(self._file)}

    async def end(self) -> None:
        pass

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Trace:
    """A file of Chrome's event format."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._lanes = perfetto.Lanes()
        self._between = b""  # two events
        self._taken = 0

    def begin(self, state: dict[str, Any] | None) -> None:
        self._file = _opened(self.path, None if state is None else state["bytes"])
        if state is None:
            self._file.write(perfetto.HEAD.encode())
            return
        self._lanes, self._between = perfetto.Lanes(state["lanes"]), b",\n" if state["is_begun"] else b""

    async def take(self, one: Whole) -> None:
        assert self._file is not None
        for event in self._lanes.events(one):
            self._file.write(self._between + to_json(event).encode())
            self._between = b",\n"
        self._taken += 1

    async def take_group(self, group: Any, members: Sequence[Whole]) -> None:
        raise NotImplementedError("a trace has no groups")

    @property
    def is_due(self) -> bool:
        return self._taken > 0

    async def commit(self) -> dict[str, Any]:
        self._taken = 0
        return {"bytes": _synced(self._file), "lanes": self._lanes.state, "is_begun": bool(self._between)}

    async def end(self) -> None:
        assert self._file is not None
        self._file.write(perfetto.TAIL.encode())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Parquet:
    """A directory of Parquet files, each written as a whole; `single` joins them to one file in the end."""

    def __init__(self, path: Path, *, of_groups: bool, single: Path | None = None) -> None:
        self.path = path
        self._form = parquet.GROUP if of_groups else parquet.ROLLOUT
        self._single = single
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0
        self._parts = self._committed = 0
        parquet.library()  # or say now what is missing

    def begin(self, state: dict[str, Any] | None) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._parts = self._committed = 0 if state is None else state["parts"]
        for number, part in self._there():
            if number >= self._parts:
                part.unlink()
        for left in self.path.glob("_part-*.partial"):  # by an export that was killed
            left.unlink()

    def _there(self) -> list[tuple[int, Path]]:
        found = [(part.stem.removeprefix("part-"), part) for part in self.path.glob("part-*.parquet")]
        return sorted((int(number), part) for number, part in found if number.isdecimal())

    async def take(self, one: Whole) -> None:
        self._add(records.row(one))

    async def take_group(self, group: Any, members: Sequence[Whole]) -> None:
        self._add(groups.row(group, members))

    def _add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self._bytes += len(to_json(row))
        if len(self._rows) >= PART_ROWS or self._bytes >= PART_BYTES:
            self._flush()

    @property
    def is_due(self) -> bool:
        return self._parts > self._committed

    def _flush(self) -> None:
        if self._rows:
            parquet.write(self.path / f"part-{self._parts:05}.parquet", self._rows, self._form)
            self._parts += 1
        self._rows, self._bytes = [], 0

    async def commit(self) -> dict[str, Any]:
        self._flush()
        self._committed = self._parts
        return {"parts": self._parts}

    async def end(self) -> None:
        self._flush()
        if self._single is not None:
            parquet.join([part for _, part in self._there()], self._single, self._form)
            shutil.rmtree(self.path)

    def close(self) -> None:
        pass


def _opened(path: Path, size: int | None) -> BinaryIO:
    """A file, empty or cut off behind so many bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if size is None:
        return path.open("wb")
    if not path.exists() or path.stat().st_size < size:
        raise ExportError(
            f"{path} is shorter than its cursor file says, so it was changed since; say --anew to replace it"
        )
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file


def _synced(file: BinaryIO | None) -> int:
    assert file is not None
    file.flush()
    os.fsync(file.fileno())
    return file.tell()


# -- a collector -------------------------------------------------------------------------------------------------------


def collector_url(url: str) -> str:
    """The address of a collector's traces. Raises `ExportError`."""
    try:
        parts = urllib.parse.urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_url = False
    if not is_url:
        raise ExportError(f"{url!r} is no address of a collector; write http://HOST:4318 or http://HOST:6006/v1/traces")
    return url if parts.path not in ("", "/") else urllib.parse.urlunsplit(parts._replace(path="/v1/traces"))


class Collector:
    """A collector that takes OTLP over HTTP, as protobuf.

    Attributes:
        sent: spans that it has taken.
        rejected: spans that it has refused, and why.
    """

    def __init__(self, url: str, headers: Mapping[str, str], *, is_openinference: bool) -> None:
        self.url: str = collector_url(url)
        self.sent: int = 0
        self.rejected: tuple[int, str] = (0, "")
        self._has_answered = False
        self._headers = {
            "Content-Type": "application/x-protobuf", "Content-Encoding": "gzip", "User-Agent": "raystore", **headers,
        }  # fmt: skip
        self._is_openinference = is_openinference
        self._waiting: list[Whole] = []
        otlp.messages()  # or say now what is missing

    def begin(self, state: dict[str, Any] | None) -> None:
        self.sent = 0 if state is None else state["spans"]

    async def take(self, one: Whole) -> None:
        self._waiting.append(one)
        if len(self._waiting) >= CHUNK:
            await self._send()

    async def take_group(self, group: Any, members: Sequence[Whole]) -> None:
        raise NotImplementedError("a collector takes no groups")

    @property
    def is_due(self) -> bool:
        return True

    async def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for body, count in otlp.requests(waiting, is_openinference=self._is_openinference):
            await self._post(gzip.compress(body, 5))
            self.sent += count

    async def _post(self, body: bytes) -> None:
        """Send a request; again, if the collector cannot take it at the moment."""
        delay = 0.5
        for left in range(TRIES - 1, -1, -1):
            try:
                answer = await asyncio.to_thread(self._ask, body)
            except urllib.error.HTTPError as error:
                with error:
                    if error.code not in BUSY or not left:
                        raise ExportError(self._refusal(error)) from None
                    delay = _seconds(error.headers.get("Retry-After"), delay)
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                if not self._has_answered or not left:  # it is not there, or has gone for good
                    raise ExportError(f"no collector answers at {self.url}: {reason}") from None
            else:
                self._has_answered = True
                self._note(answer)
                return
            await asyncio.sleep(delay)
            delay = min(2 * delay, 30.0)

    def _ask(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.url, body, self._headers, method="POST")
        with urllib.request.urlopen(request, timeout=POST_SECONDS) as answer:
            return bytes(answer.read())

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        said = _status_text(error.read(10_000))
        hint = ""
        if error.code in (404, 405):
            hint = ". OTLP over HTTP is at .../v1/traces of a collector, mostly on port 4318"
        elif error.code in (401, 403):
            hint = ". Say --header authorization='Bearer ...', or what it asks for"
        return f"{self.url} refuses the spans with HTTP {error.code} {error.reason}{said and ': ' + said}{hint}"

    def _note(self, answer: bytes) -> None:
        """Remember what a collector has refused of a request that it has taken."""
        with contextlib.suppress(Exception):  # an answer that is no protobuf says nothing
            told = otlp.messages().ExportTraceServiceResponse.FromString(answer).partial_success
            if told.rejected_spans:
                self.rejected = self.rejected[0] + told.rejected_spans, told.error_message

    async def commit(self) -> dict[str, Any]:
        await self._send()
        return {"spans": self.sent}

    async def end(self) -> None:
        pass

    def close(self) -> None:
        pass


def _seconds(text: str | None, otherwise: float) -> float:
    """What `Retry-After` says, if it is a number of seconds."""
    return min(float(text), 60.0) if text is not None and text.isdecimal() else otherwise


def _status_text(body: bytes) -> str:
    """What an error's `google.rpc.Status` says, as protobuf or JSON, or a short text."""
    with contextlib.suppress(Exception):
        if body[:1] == b"{":
            return str(json.loads(body).get("message", ""))[:300]
        from google.rpc import status_pb2

        return str(status_pb2.Status.FromString(body).message)[:300]
    return " ".join(body.decode("utf-8", "replace").split())[:300]


# -- how far it is -----------------------------------------------------------------------------------------------------


class CursorFile:
    """The file that says how far an export is.

    Attributes:
        place: in the store; None: at the beginning.
        state: of the target.
        count: rollouts, or groups, so far.
    """

    def __init__(self, path: Path, what: Mapping[str, Any]) -> None:
        self.path = path
        self.place: Any = None
        self.state: dict[str, Any] | None = None
        self.count: int = 0
        self._what = dict(what)

    def load(self) -> bool:
        """Go on where the file says, if there is one. Raises `ExportError` if it is of another export."""
        try:
            found = json.loads(self.path.read_text())
            version, what = found["version"], found["what"]
            place, state, count = found["place"], found["state"], found["count"]
        except FileNotFoundError:
            return False
        except (ValueError, KeyError, TypeError):
            raise ExportError(f"{self.path} is no cursor file of an export; say --anew to begin anew") from None
        if version != VERSION:
            raise ExportError(f"{self.path} was written by another version of raystore; say --anew to begin anew")
        for name, value in self._what.items():
            if what.get(name, value) != value:
                told = f"{name} {what[name]!r}, and now it is {value!r}"
                raise ExportError(f"{self.path} belongs to an export with {told}; say --anew to begin anew")
        self.place, self.state, self.count = place, state, count
        return True

    def save(self, place: Any, state: dict[str, Any], count: int) -> None:
        """Remember that everything up to this place is in the target, in this state."""
        self.place, self.state, self.count = place, state, count
        told = {"version": VERSION, "what": self._what, "place": place, "state": state, "count": count}
        started = self.path.with_name(self.path.name + ".partial")
        started.write_text(json.dumps(told))
        started.replace(self.path)
