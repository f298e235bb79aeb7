"""`raystore why` and `raystore doctor`: findings in words, each with its evidence and the next thing to do.

What they find is the store's (`store.why`) and the examination's (`doctor`); here it is only shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click
from rich.text import Text

from raystore.cli.endings import BAD_NEWS, WrongUse
from raystore.cli.plainly import plain
from raystore.cli.reading import View, reading
from raystore.cli.text import clean


def draw_findings(view: View, findings: Sequence[Any], nothing: str) -> None:
    """The findings, the first of which matters most."""
    if view.wants_json:
        view.give({"findings": findings})
        return
    if not findings:
        view.screen.print(nothing)
    for number, finding in enumerate(findings, 1):
        head = Text(f"{number}. " if len(findings) > 1 else "")
        view.screen.print(head.append(clean(finding.text), style="bold" if number == 1 else ""))
        if finding.remedy:
            view.screen.print(f"   → {finding.remedy}")
        told = [f"{name}={value}" for name, value in plain(finding.evidence).items()]
        if told:
            view.screen.print(Text(f"   {finding.kind}: {clean(', '.join(told), 400)}", style="dim"))


@reading("raystore why ro-5d41402abc4b")
@click.argument("id", required=False, metavar="[ID]")
async def why(view: View, *, id: str | None) -> None:
    """What holds a run up; or what one rollout, group or consumer waits for. The binding constraint comes first."""
    store: Any = view.store
    asked: dict[str, str] = {}
    if id is not None:
        if await store.get_rollout_by_id(id) is not None:
            asked["rollout_id"] = id
        elif await store.get_group(id) is not None:
            asked["group_id"] = id
        elif id in (await store.statistics())["consumers"]:
            asked["consumer"] = id
        else:
            raise WrongUse(f"{id!r} is no rollout, group or consumer of this store")
    # That a journal is only read is what --journal asked for.
    findings = [one for one in await store.why(**asked) if not (view.is_journal and one.kind == "read_only")]
    draw_findings(view, findings, "nothing holds it up")


@reading("raystore doctor --json")
@click.argument("rollout_id", required=False, metavar="[ROLLOUT]")
@click.option("--check", is_flag=True, help="Exit with 1 if anything is found.")
async def doctor(view: View, *, rollout_id: str | None, check: bool) -> None:
    """What looks wrong with a run, or with one rollout, each with its remedy."""
    examine = import_module("raystore.cli.doctor").examine
    if rollout_id is not None and await view.store.get_rollout_by_id(rollout_id) is None:
        raise WrongUse(f"no rollout {rollout_id!r}; raystore rollouts lists them")
    findings = await examine(view.store, rollout_id)
    draw_findings(view, findings, "nothing looks wrong")
    if check and findings:
        raise click.exceptions.Exit(BAD_NEWS)
