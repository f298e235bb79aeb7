"""`raystore evaluations`: what was measured beside training; of one name the curve, step by step.

Not here: the rewards of all rollouts, with those of evaluations beside them (`curve`).
"""

from __future__ import annotations

from typing import Any

import click

from raystore.cli.drawing import Column
from raystore.cli.endings import WrongUse
from raystore.cli.reading import COUNT, View, reading
from raystore.cli.text import duration, figure, share
from raystore.errors.text import meant
from raystore.types.evaluations import EvaluationResult, EvaluationScore

_COLUMNS = [
    Column("evaluation"), Column("version", right=True), Column("status", 1), Column("items", 3, True),
    Column("samples", 1, True), Column("failed", 2, True), Column("mean", right=True), Column("95 %", 2),
    Column("pass@1", 1, True), Column("pass@k", 2), Column("ran with", 3), Column("began", 4, True), Column("why", 4),
]  # fmt: skip
_ENVIRONMENTS = [
    Column("version", right=True), Column("environment"), Column("items", 3, True), Column("samples", 2, True),
    Column("failed", 2, True), Column("mean", right=True), Column("95 %", 1), Column("pass@1", 1, True),
    Column("pass@k", 2),
]  # fmt: skip


@reading("raystore evaluations eval")
@click.argument("evaluation", required=False, metavar="[NAME]")
@click.option("--limit", **COUNT, default=20, help="So many of the newest versions of a name at most.")
async def evaluations(view: View, *, evaluation: str | None, limit: int) -> None:
    """All evaluations, the newest of each name; or the versions of one, with the scores of its environments.

    The mean is that of items, with its 95 % interval. pass@k is told of the largest k. A version with a branch (7.1)
    was made after a restore; one that a restore has undone is marked.
    """
    found = await view.store.evaluations()
    names = list(dict.fromkeys(one.name for one in found))
    if evaluation is not None and evaluation not in names:
        there = f"there are {', '.join(names)}" if names else "there is none"
        raise WrongUse(f"no evaluation {evaluation!r} in this store{meant(evaluation, names)}; {there}")
    if view.wants_json:
        view.give({"evaluations": [one.model_dump() for one in found if evaluation in (None, one.name)]})
        return
    screen = view.screen
    if not found:
        screen.print("no evaluation has begun in this store: feed.evaluate(items, version=step) begins one")
        return
    if evaluation is None:
        newest = {one.name: one for one in found}  # of each name the last, which is the newest version
        screen.table(_COLUMNS, [_row(view, one) for one in newest.values()])
        return
    chosen = [one for one in found if one.name == evaluation]
    screen.table(_COLUMNS, [_row(view, one) for one in chosen[-limit:]])
    if any(len(one.environments) > 1 for one in chosen[-limit:]):
        screen.heading("by environment")
        rows = [
            [_version(one), environment, *_scores(score)]
            for one in chosen[-limit:]
            for environment, score in one.environments.items()
        ]
        screen.table(_ENVIRONMENTS, rows)
    if len(chosen) > limit:
        screen.print(f"{limit} of {len(chosen)}; --limit shows more")


def _row(view: View, one: EvaluationResult) -> list[Any]:
    items, samples, *rest = _scores(one.overall)
    status = one.status + (", undone" if one.undone else "")
    if one.enqueued < one.items:
        status += f", {one.enqueued:,} of {one.items:,} enqueued"
    if one.status == "running":
        samples = share(one.overall.samples, one.items * one.samples)
    least, most = one.versions or (None, None)
    ran_with = "" if least is None else f"{least}" if least == most else f"{least} to {most}"
    age = view.age(one.start_time)
    began = "" if age is None else f"{duration(age)} ago"
    return [one.name, _version(one), status, items, samples, *rest, ran_with, began, one.why or ""]


def _version(one: EvaluationResult) -> str:
    version = "none" if one.version is None else str(one.version)
    return f"{version}.{one.branch}" if one.branch else version


def _scores(score: EvaluationScore) -> list[Any]:
    """Items, samples, failed, mean, its interval, pass@1, and pass@k of the largest k."""
    low_high = "" if score.confidence is None else " to ".join(map(figure, score.confidence))
    most = max(score.pass_at, default=1)
    last = f"{figure(score.pass_at[most])} (k={most})" if most > 1 else ""
    first = figure(score.pass_at[1]) if 1 in score.pass_at else ""
    mean = "" if score.mean is None else figure(score.mean)
    return [f"{score.items:,}", f"{score.samples:,}", score.failed or "", mean, low_high, first, last]
