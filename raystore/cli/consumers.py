"""`raystore consumers`: who trains on what, by which steps, and what a restart at a checkpoint would undo."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import click

from raystore.cli.drawing import Column
from raystore.cli.endings import WrongUse
from raystore.cli.reading import COUNT, View, all_of, reading
from raystore.cli.stores import CONSUMER_COLUMNS, consumer_row
from raystore.cli.text import clean, figure, share
from raystore.errors import SpansEvictedError
from raystore.errors.text import meant, quoted
from raystore.types.contract import LedgerEntry

_STEPS = [
    Column("step"), Column("batches", 2, True), Column("rollouts", right=True), Column("mean reward", 1, True),
    Column("durable", 3), Column("note", 4, least=16),
]  # fmt: skip


async def the_consumer(view: View, name: str | None) -> tuple[str, dict[str, Any]]:
    """The consumer that is meant, or the only one, with what the store says of it. Raises `WrongUse`."""
    known: dict[str, dict[str, Any]] = (await view.store.statistics())["consumers"]
    if name is None and len(known) == 1:
        name = next(iter(known))
    if not known:
        raise WrongUse("no consumer has taken anything from this store yet")
    if name is None:
        raise WrongUse(f"of which consumer? There are {quoted(sorted(known))}")
    if name not in known:
        raise WrongUse(f"no consumer {name!r}{meant(name, known)}; there are {quoted(sorted(known))}")
    return name, known[name]


def metrics_of(note: str | None) -> dict[str, float]:
    """The numbers in the note of an entry, by name, where it is the JSON that a feed makes of metrics."""
    try:
        found = json.loads(note or "")
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}


def _said(note: str | None) -> str:
    """A note in a few words."""
    metrics = metrics_of(note)
    return clean(", ".join(f"{name} {figure(value)}" for name, value in metrics.items()) or note or "", 60)


def by_step(ledger: list[LedgerEntry]) -> dict[int | None, list[LedgerEntry]]:
    """The entries of each step, in the order of the steps; those that no step consumed last."""
    steps: dict[int | None, list[LedgerEntry]] = {}
    for entry in sorted(ledger, key=lambda entry: (entry.step is None, entry.step or 0)):
        steps.setdefault(entry.step, []).append(entry)
    return steps


async def rewards_of(view: View, ledger: list[LedgerEntry]) -> dict[str, float | None]:
    """The reward of each rollout of a ledger that still exists."""
    ids = [entry.rollout_id for entry in ledger]
    return {one.rollout_id: one.reward for one in (await view.store.query_rollouts(rollout_id_in=ids) if ids else ())}


@reading("raystore consumers trainer --rewind 400")
@click.argument("consumer", required=False, metavar="[CONSUMER]")
@click.option("--rewind", type=click.IntRange(0), metavar="STEP", help="What rewind(STEP) would undo; undoes nothing.")
@click.option("--limit", **COUNT, default=20, help="So many steps at most.")
@click.option("--follow", is_flag=True, help="Go on with what is taken and consumed.")
async def consumers(view: View, *, consumer: str | None, rewind: int | None, limit: int, follow: bool) -> None:
    """All consumers; the steps of one; what a restart at a checkpoint would undo.

    A step of a CONSUMER is what it said with `ack(step=)`. With --rewind it is said which steps and rollouts a trainer
    that starts with the model of STEP would train on again, and which of them cannot be had any more.
    """
    if rewind is not None:
        name, told = await the_consumer(view, consumer)
        await _rewind(view, name, told, rewind)
        return
    known = (await view.store.statistics())["consumers"]
    changed = await view.following("taken", "consumed", "returned", "checkpoint", "rewound") if follow else None
    if consumer is None:
        await _overview(view, known, is_first=not follow)
    else:
        name, told = await the_consumer(view, consumer)
        steps = by_step(await view.store.ledger(name))
        if view.wants_json and not follow:
            view.give({"consumer": name, **told, "steps": [_as_plain(step, steps[step]) for step in steps]})
        elif not view.wants_json:
            await _steps(view, name, told, steps, limit)
    if changed is None:
        return
    async for changes in changed:
        for change in changes:
            detail = change.detail or {}
            if consumer is None or detail.get("consumer") == consumer:
                if view.wants_json:
                    view.give_lines([change])
                else:
                    said = ", ".join(f"{key} {value}" for key, value in detail.items() if value is not None)
                    view.screen.print(f"{change.kind}: {said}")


async def _overview(view: View, known: dict[str, Any], *, is_first: bool) -> None:
    if view.wants_json:
        if is_first:
            view.give({"consumers": known})
    elif not known:
        view.screen.print("no consumer has taken anything from this store yet")
    else:
        view.screen.table(CONSUMER_COLUMNS, [consumer_row(name, known[name]) for name in known])


def _as_plain(step: int | None, entries: list[LedgerEntry]) -> dict[str, Any]:
    return {
        "step": step, "batches": sorted({entry.batch for entry in entries}), "durable": entries[0].is_durable,
        "note": entries[0].note, "rollout_ids": [entry.rollout_id for entry in entries],
    }  # fmt: skip


async def _steps(
    view: View, name: str, told: dict[str, Any], steps: dict[int | None, list[LedgerEntry]], limit: int
) -> None:
    view.screen.table(CONSUMER_COLUMNS, [consumer_row(name, told)])
    shown = dict(list(steps.items())[-limit:])
    rewards = await rewards_of(view, [entry for entries in shown.values() for entry in entries])
    rows = []
    for step, entries in shown.items():
        got = [reward for entry in entries if (reward := rewards.get(entry.rollout_id)) is not None]
        rows.append([
            "held" if step is None else step, len({entry.batch for entry in entries}), len(entries),
            figure(sum(got) / len(got)) if got else "", "yes" if entries[0].is_durable else "no",
            _said(entries[0].note),
        ])  # fmt: skip
    view.screen.heading("steps")
    view.screen.table(_STEPS, rows)
    if len(shown) < len(steps):
        view.screen.print(f"{len(shown)} of {len(steps)}; --limit shows more")


# -- a rewind, without doing it ----------------------------------------------------------------------------------------


async def _rewind(view: View, name: str, told: dict[str, Any], step: int) -> None:
    """What `rewind(step)` would undo. Raises `WrongUse` for a step that it would refuse."""
    checkpoint = told["checkpoint"]
    if checkpoint is not None and step < checkpoint:
        raise WrongUse(
            f"consumer {name!r} has a checkpoint at step {checkpoint}: what earlier steps consumed is not kept, and a "
            f"rewind to {step} would be refused"
        )
    ledger = await view.store.ledger(name)
    again = [entry for entry in ledger if entry.step is None or entry.step > step]
    undone = sorted({entry.step for entry in again if entry.step is not None})
    fates = await all_of([lambda one=entry: _fate(view, one.rollout_id) for entry in again])  # type: ignore[misc]
    lost = [entry.rollout_id for entry, fate in zip(again, fates, strict=True) if fate != "whole"]
    if view.wants_json:
        view.give(
            {
                "consumer": name,
                "rewind": step,
                "steps_undone": undone,
                "rollouts_again": [entry.rollout_id for entry in again],
                "lost": lost,
            }
        )
        return
    screen, held = view.screen, sum(entry.step is None for entry in again)
    screen.heading(f"if {name} went back to step {step}", "nothing is changed by asking")
    last = max((entry.step for entry in ledger if entry.step is not None), default=None)
    if last is None or (last <= step and not held):
        screen.print("nothing would be lost or repeated: no later step has consumed anything")
        return
    named = f"{undone[0]} to {undone[-1]}" if len(undone) > 1 else "".join(map(str, undone))
    screen.facts(
        [
            ("steps lost", f"{len(undone)} ({named})" if undone else "none"),
            ("trained on again", f"{len(again) - held:,} rollouts, that these steps consumed"),
            ("given again", f"{held:,} rollouts, that were taken and no step consumed" if held else None),
            ("stays consumed", f"{len(ledger) - len(again):,} rollouts of the ledger"),
        ]
    )
    reasons = Counter(fate for fate in fates if fate != "whole")
    for fate, count in reasons.items():
        screen.print(f"{count:,} of them ({share(count, len(again))}) {fate}, as {lost[0]}")
    if not lost:
        screen.print("all of them are there, with their spans")


async def _fate(view: View, rollout_id: str) -> str:
    """Whether a rollout can be trained on again, and if not, why."""
    try:
        await view.store.query_spans(rollout_id, limit=0)
    except SpansEvictedError:
        return "have lost spans to eviction"
    return "whole" if await view.store.get_rollout_by_id(rollout_id) is not None else "do not exist any more"
