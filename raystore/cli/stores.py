"""Stores themselves: which there are, how one stands, starting and stopping them."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import click

from raystore.cli.drawing import Column, Screen
from raystore.cli.finding import Where, cluster, end, join
from raystore.cli.plainly import as_json
from raystore.cli.reading import JSON, STORE_OPTIONS, View, Word, command_of, reading
from raystore.cli.text import counted, duration, share, size


@reading("raystore status --journal runs/grpo")
async def status(view: View) -> None:
    """One page on a store: rollouts, queues, consumers, memory, journal."""
    told: dict[str, Any] = dict(await view.store.statistics())
    if view.wants_json:
        view.give(told)
        return
    screen = view.screen
    what = f"journal {view.where.journal}" if view.is_journal else f"store {told['name']}"
    info = getattr(view.store, "info", None)
    if info is not None and info.name:
        what = f"store {info.name}"
    screen.heading(what, "as its journal ends" if view.is_journal else f"up for {duration(told.get('uptime'))}")
    screen.facts(
        [
            ("rollouts", _counts(told["rollouts_by_status"]) or "none"),
            ("groups", _counts(told["groups_by_status"])),
            ("spans", f"{told['total_spans']:,} in {size(told['total_span_bytes'])}"),
            ("attempts", f"{told['total_attempts']:,}"),
            ("runners", _runners(told, view)),
            ("memory", size(told["accounted_bytes"]) if view.is_journal else _memory(told)),
            ("evicted", _evicted(told)),
            ("lost spans", _counts(told.get("spans_lost") or {})),
            ("store's process", None if view.is_journal else _process(told)),
            ("journal", None if view.is_journal else _journal(told.get("journal"))),
            ("refused", f"{told['overloads']:,} calls: too much of something" if told.get("overloads") else ""),
        ]
    )
    queues = _queues(told, view.is_journal)
    if queues:
        screen.heading("queues")
        columns = [
            Column("queue"),
            Column("waiting", right=True),
            Column("backing off", 3, True),
            Column("held by", 1, least=16),
        ]
        screen.table(columns, queues)
    if told["consumers"]:
        screen.heading("consumers")
        screen.table(CONSUMER_COLUMNS, [consumer_row(name, told["consumers"][name]) for name in told["consumers"]])
    if told["held_back_by_resources"]:
        screen.heading("held back until their resources are published again")
        screen.facts((name, counted(count, "rollout")) for name, count in told["held_back_by_resources"].items())


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)


def _runners(told: dict[str, Any], view: View) -> str:
    known = f"{told['total_workers']:,} known"
    return known if view.is_journal else f"{known}, {counted(told['sessions'], 'process', 'processes')} connected"


def _memory(told: dict[str, Any]) -> str:
    used, threshold = told["accounted_bytes"], told["eviction_threshold_bytes"]
    text = f"{size(used)} of {size(threshold)} before spans are evicted ({share(used, threshold)})"
    if told["memory_full"]:
        waits = told.get("waits_for_consumer")
        text += "; FULL, no work is handed out" + (f" until consumer {waits} goes on" if waits else "")
    return text


def _evicted(told: dict[str, Any]) -> str:
    if not told["evicted_spans"]:
        return ""
    return f"{told['evicted_spans']:,} spans of {counted(told['evicted_rollouts'], 'rollout')}"


def _process(told: dict[str, Any]) -> str:
    busy = share(told.get("cpu_seconds") or 0.0, told.get("uptime") or 0.0)
    return f"{size(told['rss_bytes'])}, {busy} of a core" if told.get("rss_bytes") and busy else ""


def _journal(told: dict[str, Any] | None) -> str:
    if told is None:
        return ""
    text = f"{told['operations_since_snapshot']:,} operations since the last snapshot, {told['snapshots']} so far"
    return text + (f"; NO MORE SNAPSHOTS: {told['failed']}" if told["failed"] else "")


def _queues(told: dict[str, Any], is_journal: bool) -> list[list[Any]]:
    """Of each queue: how many wait, and what holds them back."""
    paused = {pause["queue"]: pause for pause in told.get("paused", ())}
    unserved, limits = told.get("unserved_queues", {}), told.get("queue_limits", {})
    names = sorted({*told["queue_lengths"], *limits, *unserved, *(name for name in paused if name is not None)})
    rows = []
    for name in names:
        held = []
        if name in paused or None in paused:
            held.append("paused")
        if (limit := limits.get(name)) is not None:
            at = f"at most {limit['max_running']} at once" if limit["max_running"] is not None else ""
            rate = f"{limit['per_minute']} a minute" if limit["per_minute"] is not None else ""
            held.append(", ".join(filter(None, [at, rate])) + (" (reached)" if limit["reached"] else ""))
        if name in unserved and not is_journal:
            held.append(f"nobody asked for its work for {duration(unserved[name])}")
        waiting, backing = told["queue_lengths"].get(name, 0), told["backing_off_by_queue"].get(name)
        rows.append([name, f"{waiting:,}", backing, "; ".join(held)])
    return rows


CONSUMER_COLUMNS = [
    Column("consumer"), Column("takes", 2), Column("awaits", right=True), Column("open batches", 1, True),
    Column("batches", 3, True), Column("checkpoint", 1, True), Column("unreleased", 4, True),
    Column("filter", 5, least=16),
]  # fmt: skip


def consumer_row(name: str, told: dict[str, Any]) -> list[Any]:
    """The cells of a consumer, of what `statistics` says of it."""
    filters = ", ".join(f"{key}={value}" for key, value in told["filter"].items())
    return [
        name, told["takes"], f"{told['awaited']:,}", len(told["open"]), told["batches"], told["checkpoint"],
        told["unreleased"], filters,
    ]  # fmt: skip


# -- all stores --------------------------------------------------------------------------------------------------------

_ADDRESS = STORE_OPTIONS[2]


def _list(address: str | None, namespace: str | None, json: bool) -> None:
    """The stores that run on a cluster, of all namespaces unless one is given."""
    join(address)
    from raystore.remote.store import list_stores

    screen, found = Screen(), list_stores(namespace=namespace)
    if json:
        screen.file.write(as_json({"stores": found}, indent=2) + "\n")
        return
    if not found:
        screen.print(f"no store runs {'in namespace ' + repr(namespace) if namespace else 'on this cluster'}")
        return
    columns = [Column("name"), Column("namespace"), Column("store id", 2), Column("node", 3)]
    screen.table(columns, [[one.name, one.namespace, one.store_id, one.node] for one in found])


list_: click.Command = command_of(_list, "raystore list --address 10.0.0.1:6379", [
        click.Option(["--namespace"], envvar="RAYSTORE_NAMESPACE", metavar="NAME", help="Only of this namespace."),
        _ADDRESS, JSON,
    ])  # fmt: skip


# -- starting and stopping ---------------------------------------------------------------------------------------------


def _start(name: str | None, namespace: str, address: str | None, journal: Path | None, resume: str) -> None:
    """Start a store that outlives this command, until `raystore stop`.

    Without a cluster Ray is started, too; then this command stays in the foreground, and Ctrl+C ends both.
    """
    found = cluster(address, may_start=True)
    join(found or "local", may_start=True)
    from raystore.remote.store import start

    options: dict[str, Any] = {} if journal is None else {"journal": journal.absolute(), "resume": resume}
    store = start(name, namespace=namespace, detached=found is not None, **options)
    screen, called = Screen(), store.info.name
    where = found or _address_here()
    screen.print(f"store {called} runs in namespace {namespace} of the cluster at {where}")
    screen.print(f"  in Python:    rs.connect({called!r}, namespace={namespace!r}, address={where!r})")
    screen.print(f"  on this line: raystore status --address {where} --name {called}")
    if found is not None:
        screen.print(f"  to end it:    raystore stop {called} --address {where}")
        store.close()
        return
    screen.print("Ray was started for it. Ctrl+C ends both.")
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    screen.print(f"ending store {called}, and Ray")
    store.close()
    import ray

    ray.shutdown()


def _address_here() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


start: click.Command = command_of(_start, "raystore start trainer --journal runs/grpo", [
        click.Argument(["name"], required=False),
        *STORE_OPTIONS[1:3],
        click.Option(
            ["--journal"], type=click.Path(path_type=Path), metavar="DIR",
            help="Keep everything in this directory; go on with the run that is in it.",
        ),
        click.Option(
            ["--resume"], type=Word(["auto", "must", "never"], "way to resume"), default="auto",
            help="auto (default): go on with the run in the journal, if there is one.",
        ),
    ])  # fmt: skip


def _stop(name: str, namespace: str, address: str | None) -> None:
    """End a store, whoever started it. What it holds is gone, except for what its journal has."""
    end(Where(name, namespace, address))
    Screen().print(f"store {name} has ended")


stop: click.Command = command_of(_stop, "raystore stop trainer", [click.Argument(["name"]), *STORE_OPTIONS[1:3]])
