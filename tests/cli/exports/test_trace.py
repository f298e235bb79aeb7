"""The trace, by the rules of Chrome's event format, and what Perfetto shows of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import raystore as rs
from raystore.cli.exports import perfetto
from tests.cli.exports.conftest import LARGE, Run, finish, odd
from tests.cli.small_run import HOSTILE, fill
from tests.conftest import MakeMemoryStore

#: What each phase of the format must have, besides ph, pid, tid and name.
REQUIRED = {"X": {"ts", "dur", "cat", "args"}, "i": {"ts", "s", "cat", "args"}, "M": {"args"}}


def checked(path: Path) -> list[dict[str, Any]]:
    """The events of a file, which must be as the format says."""
    document = json.loads(path.read_text(encoding="ascii"))
    assert document["displayTimeUnit"] in ("ms", "ns") and document.keys() == {"displayTimeUnit", "traceEvents"}
    events: list[dict[str, Any]] = document["traceEvents"]
    named: set[tuple[str, int, int]] = set()
    threads: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in events:
        assert event.keys() == {"ph", "name", "pid", "tid"} | REQUIRED[event["ph"]], event
        assert isinstance(event["name"], str) and event["name"]
        assert type(event["pid"]) is int and type(event["tid"]) is int and 0 <= event["pid"] < 2**31
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name") and isinstance(event["args"]["name"], str)
            key = (event["name"], event["pid"], event["tid"])
            assert key not in named
            named.add(key)
            continue
        where = event["pid"], event["tid"]
        assert ("thread_name", *where) in named and ("process_name", event["pid"], 0) in named  # before its first event
        assert type(event["ts"]) is int and isinstance(event["args"], dict)
        if event["ph"] == "X":
            assert type(event["dur"]) is int and event["dur"] >= 0
            threads.setdefault(where, []).append((event["ts"], event["ts"] + event["dur"]))
        else:
            assert event["s"] in ("g", "p", "t")
    for slices in threads.values():
        open_ends: list[int] = []
        for begin, end in sorted(slices, key=lambda one: (one[0], -one[1])):
            while open_ends and open_ends[-1] <= begin:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1], "slices of a thread overlap"
            open_ends.append(end)
    return events


async def test_a_trace_is_as_the_format_says(make_memory_store: MakeMemoryStore, run: Run, tmp_path: Path) -> None:
    """Each runner is a process; its attempts and their spans are slices with what they say."""
    store = make_memory_store(clock="manual")
    await fill(store)
    run(store, "--to", tmp_path / "trace.json")
    events = checked(tmp_path / "trace.json")
    processes = {event["args"]["name"]: event["pid"] for event in events if event["name"] == "process_name"}
    assert processes.keys() == {"runner-1", "runner-2"}
    attempts = {event["name"]: event for event in events if event.get("cat") == "attempt"}
    raised = attempts["raises-0"]
    assert raised["args"]["outcome"] == "agent_error" and "ValueError" in raised["args"]["error"]
    error = next(event for event in events if event.get("cat") == "error" and event["name"] == "parse")
    assert raised["ts"] <= error["ts"] <= raised["ts"] + raised["dur"] and error["pid"] == processes["runner-1"]
    assert error["args"]["description"] == "ValueError: 'four'" and error["args"]["status"] == "ERROR"
    calls = [event for event in events if event["name"] == "tool.calculator"]
    finished = [one.rollout_id for one in (await store.completed(limit=1000)).items]
    spans = [span for found in (await store.query_many_spans(finished, None)).values() for span in found]
    assert len(calls) == [span.name for span in spans].count("tool.calculator") > 0
    assert all(abs(event["dur"] - 1_400_000) <= 1 for event in calls)
    assert len([event for event in events if event.get("cat") in ("span", "error")]) == len(spans)


async def test_odd_values_are_cut_and_escaped(make_memory_store: MakeMemoryStore, run: Run, tmp_path: Path) -> None:
    """A trace is to look at: of 10 MB there is the beginning; a span without times is an instant."""
    store = make_memory_store()
    await odd(store)
    await finish(store, list(range(1000)))
    run(store, "--to", tmp_path / "trace.json")
    assert (tmp_path / "trace.json").stat().st_size < 50_000
    events = checked(tmp_path / "trace.json")
    (instant,) = [event for event in events if event["ph"] == "i"]
    assert instant["name"] == f"say {HOSTILE}" and f"({LARGE:,} characters)" in instant["args"]["large"]
    (task,) = [event["args"]["input"] for event in events if isinstance(event.get("args", {}).get("input"), list)]
    assert task[:2] == [0, 1] and task[-1] == "... (1,000 items)"


async def test_what_happens_at_the_same_time_is_beside(
    make_memory_store: MakeMemoryStore, run: Run, tmp_path: Path
) -> None:
    """Attempts of a runner that overlap have places of their own, and so have calls of an agent that overlap."""
    store, rng = make_memory_store(clock="manual"), random.Random(7)
    running: list[Any] = []
    for number in range(60):
        if len(running) < 4:
            await store.enqueue_rollout(number)
            claimed = await store.dequeue_rollout("busy")
            assert claimed is not None
            running.append(claimed)
        await store.testing.tick(1.0)
        if len(running) == 4 or rng.random() < 0.3:
            one = running.pop(rng.randrange(len(running)))
            ids: dict[str, Any] = {"rollout_id": one.rollout_id, "attempt_id": one.attempt.attempt_id}
            spans = []
            for index in range(5):
                begin = one.attempt.start_time + rng.random() / 2
                times = {"start_time": begin, "end_time": begin + rng.random() / 2}
                spans.append(rs.Span.from_attributes(name=f"call {index}", attributes={}, **times, **ids))
            await store.finish_attempt(one.rollout_id, one.attempt.attempt_id, spans, "succeeded")
    run(store, "--to", tmp_path / "trace.json")
    events = checked(tmp_path / "trace.json")
    names = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert {"place 1", "place 2", "place 3", "place 4"} <= {*names} and "place 5" not in names
    assert any(", beside it 1" in name for name in names)


def test_slices_are_nested_or_apart() -> None:
    """Whatever they are; each is on one thread, and a thread is not opened without need."""
    rng = random.Random(3)
    for _ in range(200):
        made: list[perfetto.Slice] = [
            (begin := rng.randrange(30), begin + rng.randrange(10), "x", "span", {}) for _ in range(12)
        ]
        tracks = perfetto.nested(made)
        assert sorted(made, key=repr) == sorted((one for track in tracks for one in track), key=repr)
        for track in tracks:
            for one in track:
                for other in track:
                    lies_within = one[0] <= other[0] and other[1] <= one[1]
                    is_apart = one[1] <= other[0] or other[1] <= one[0]
                    assert lies_within or is_apart or (other[0] <= one[0] and one[1] <= other[1])
    assert len(perfetto.nested([(0, 10, "a", "span", {}), (2, 4, "b", "span", {}), (4, 9, "c", "span", {})])) == 1
