"""A trace in Chrome's event format, for Perfetto (ui.perfetto.dev) and chrome://tracing.

A runner is a process, and each of its places a thread: an attempt is a slice there, with the slices of its spans in
it. So one sees who did what when, and who was idle. Slices of one thread lie within each other or apart, as the format
asks for; what overlaps otherwise (calls that an agent makes at the same time) goes to threads beside. Times are
microseconds. What a slice says of itself is for people to look at: of long texts and lists there is the beginning
only.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from raystore.cli.exports.records import field_of, plain, text
from raystore.cli.exports.source import Whole

HEAD = '{"displayTimeUnit":"ms","traceEvents":[\n'
TAIL = "\n]}\n"
NOBODY = "started by hand"  #: in place of a runner, for attempts that no worker is named for
SHOWN_CHARACTERS = 2_000
SHOWN_ITEMS = 50
_TRACKS = 10_000  # threads that a place may have beside it

#: A slice: begin, end, name, category, what it says.
Slice = tuple[int, int, str, str, dict[str, Any]]


class Lanes:
    """The threads of each runner, so far.

    Attributes:
        state: of each runner its places: when each was busy last, and how many threads it has. Plain data, from which
            another export goes on.
    """

    def __init__(self, state: dict[str, list[list[int]]] | None = None) -> None:
        self.state: dict[str, list[list[int]]] = state or {}

    def events(self, one: Whole) -> Iterator[dict[str, Any]]:
        """The events of a rollout. Rollouts come in the order in which they ended."""
        for attempt in one.attempts:
            yield from self._of_attempt(one, attempt)

    def _of_attempt(self, one: Whole, attempt: Any) -> Iterator[dict[str, Any]]:
        spans = one.recorded.get(attempt.attempt_id, [])
        slices, instants = [_slice_of_attempt(one, attempt)], []
        for span in spans:
            if span.start_time is None or span.end_time is None:
                instants.append(span)
            else:
                begin = _micros(span.start_time)
                slices.append((begin, max(_micros(span.end_time), begin), *_told(span)))
        tracks = nested(slices)
        begin, end = min(one[0] for one in slices), max(one[1] for one in slices)
        worker = attempt.worker_id or NOBODY
        place = self._place(worker, begin, end)
        process = zlib.crc32(worker.encode()) & 0x7FFFFFFF
        yield from self._names(worker, process, place, len(tracks))
        for number, track in enumerate(tracks):
            where = {"pid": process, "tid": 1 + place * _TRACKS + number}
            for first, last, name, category, says in track:
                timed = {"ts": first, "dur": last - first}
                yield {"ph": "X", "name": name, "cat": category, **timed, **where, "args": says}
        for span in instants:
            name, category, says = _told(span)
            where = {"pid": process, "tid": 1 + place * _TRACKS}
            yield {"ph": "i", "s": "t", "name": name, "cat": category, "ts": slices[0][0], **where, "args": says}

    def _place(self, worker: str, begin: int, end: int) -> int:
        """The place of a runner that was free last before the beginning; it is busy until the end."""
        places = self.state.setdefault(worker, [])
        free = [(place[0], number) for number, place in enumerate(places) if place[0] <= begin]
        if not free:
            places.append([end, 0])
            return len(places) - 1
        _, number = max(free)
        places[number][0] = end
        return number

    def _names(self, worker: str, process: int, place: int, tracks: int) -> Iterator[dict[str, Any]]:
        """The names of the process and threads that have none yet."""
        known = self.state[worker][place]
        if place == 0 and known[1] == 0:
            yield {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": text(worker)}}
        for number in range(known[1], tracks):
            said = f"place {place + 1}" + (f", beside it {number}" if number else "")
            where = {"pid": process, "tid": 1 + place * _TRACKS + number}
            yield {"ph": "M", "name": "thread_name", **where, "args": {"name": said}}
        known[1] = max(known[1], tracks)


def nested(slices: list[Slice]) -> list[list[Slice]]:
    """Slices by thread, so that of two on one thread one lies within the other, or they lie apart."""
    tracks: list[tuple[list[Slice], list[int]]] = []  # slices, and the ends of those that are open
    for one in sorted(slices, key=lambda one: (one[0], -one[1])):
        for _, ends in tracks:
            while ends and ends[-1] <= one[0]:
                ends.pop()
        free = next((found for found in tracks if not found[1] or one[1] <= found[1][-1]), None)
        if free is None:
            free = [], []
            tracks.append(free)
        free[0].append(one)
        free[1].append(one[1])
    return [track for track, _ in tracks]


def _micros(seconds: float) -> int:
    return round(seconds * 1_000_000) if math.isfinite(seconds) else 0


def _slice_of_attempt(one: Whole, attempt: Any) -> Slice:
    end = attempt.end_time or attempt.last_heartbeat_time or attempt.start_time
    begin = _micros(attempt.start_time)
    says = {
        "attempt": attempt.attempt_id, "status": attempt.status, "outcome": attempt.outcome,
        "reward": plain(attempt.reward), "policy_version": attempt.policy_version, "mode": one.rollout.mode,
        "group": one.rollout.group_id, "tags": plain(one.rollout.tags), "input": field_of(one.rollout, "input"),
        "error": attempt.error,
    }  # fmt: skip
    told = {name: short(plain(value)) for name, value in says.items() if value not in (None, {})}
    return begin, max(_micros(end), begin), one.rollout.rollout_id, "attempt", told


def _told(span: Any) -> tuple[str, str, dict[str, Any]]:
    """Name, category and what a span says."""
    status = field_of(span, "status")
    code = getattr(status, "status_code", "UNSET")
    says = {text(str(name)): short(plain(value)) for name, value in _mapping(field_of(span, "attributes")).items()}
    if code != "UNSET":
        says["status"] = code
    if getattr(status, "description", None):
        says["description"] = short(text(status.description))
    return text(span.name) or "(no name)", "error" if code == "ERROR" else "span", says


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def short(value: Any) -> Any:
    """The beginning of a long text or list, with how much there is."""
    if isinstance(value, str) and len(value) > SHOWN_CHARACTERS:
        return f"{value[:SHOWN_CHARACTERS]}... ({len(value):,} characters)"
    if isinstance(value, list) and len(value) > SHOWN_ITEMS:
        return [*map(short, value[:SHOWN_ITEMS]), f"... ({len(value):,} items)"]
    if isinstance(value, list):
        return [short(held) for held in value]
    if isinstance(value, dict):
        return {name: short(held) for name, held in value.items()}
    return value
