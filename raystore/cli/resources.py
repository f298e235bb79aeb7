"""`raystore resources`: what was published, in which versions, and what changed between two of them."""

from __future__ import annotations

import difflib
from typing import Any

import click
from rich.text import Text

from raystore.cli.drawing import Column
from raystore.cli.endings import WrongUse
from raystore.cli.plainly import as_json, plain
from raystore.cli.reading import COUNT, View, all_of, reading
from raystore.cli.text import clean, clean_lines, duration
from raystore.errors import PayloadLostError
from raystore.errors.text import meant, quoted
from raystore.values.closed import Closed

COLUMNS = [
    Column("id"), Column("version", right=True), Column("policy", 2, True), Column("published", 1),
    Column("resources", least=16),
]  # fmt: skip
CONTEXT = 3  #: lines around a difference


def kind_of(resource: Any) -> str:
    """What a resource is, in a word or two; a pickle by its type and size."""
    if isinstance(resource, Closed):
        return repr(resource)
    return str(getattr(resource, "resource_type", type(resource).__name__)).replace("_", " ")


def summary(update: Any) -> str:
    """The names of resources, and what each is."""
    found = update.resources
    if not isinstance(found, dict):
        return repr(found)
    return ", ".join(f"{name}: {kind_of(resource)}" for name, resource in found.items())


def lines_of(update: Any) -> list[str]:
    """Resources as lines of text, which can be compared."""
    found, lines = update.resources, []
    if not isinstance(found, dict):
        return [repr(found)]
    for name, resource in found.items():
        lines.append(f"{clean(name)}: {kind_of(resource)}")
        if isinstance(resource, Closed):
            continue
        for field, value in plain(resource).items():
            if field == "resource_type":
                continue
            written = clean_lines(value, 100_000) if isinstance(value, str) else [as_json(value)]
            lines += (
                [f"  {field}: {written[0]}"] if len(written) == 1 else [f"  {field}:", *(f"    {w}" for w in written)]
            )
    return lines


async def _version(view: View, resources_id: str, version: int | None) -> Any:
    """One version. Raises `WrongUse` if there is none."""
    try:
        found = await view.store.get_resources_by_id(resources_id, version)
    except PayloadLostError as error:
        raise WrongUse(str(error)) from None
    if found is not None:
        return found
    newest = await view.store.get_resources_by_id(resources_id)
    if newest is None:
        known = [update.resources_id for update in await view.store.query_resources()]
        there = f"there are {quoted(known[:5])}" if known else "nothing was published"
        raise WrongUse(f"no resources {resources_id!r}{meant(resources_id, known)}; {there}")
    is_gone = version is not None and version < newest.version
    gone = ", and versions that no attempt uses are not kept for ever" if is_gone else ""
    raise WrongUse(f"no version {version} of {resources_id!r}; the newest is {newest.version}{gone}")


async def _versions(view: View, resources_id: str, limit: int) -> list[Any]:
    """The newest versions that are still there, newest first."""
    newest = await _version(view, resources_id, None)

    async def get(version: int) -> Any:
        try:
            return await view.store.get_resources_by_id(resources_id, version)
        except PayloadLostError:
            return None

    earlier = range(newest.version - 1, max(newest.version - limit, 0), -1)
    found = await all_of([lambda version=number: get(version) for number in earlier])  # type: ignore[misc]
    return [newest, *(one for one in found if one is not None)][:limit]


def _table(view: View, updates: list[Any]) -> None:
    rows = [
        [one.resources_id, one.version, one.policy_version, f"{duration(view.age(one.update_time))} ago", summary(one)]
        for one in updates
    ]
    view.screen.table(COLUMNS, rows)


@reading("raystore resources prompts --diff 3 7")
@click.argument("resources_id", required=False, metavar="[ID]")
@click.option("--version", type=click.IntRange(1), help="All of this version.")
@click.option("--diff", nargs=2, type=click.IntRange(1), metavar="OLD NEW", help="What changed between two versions.")
@click.option("--limit", **COUNT, default=20, help="So many at most.")
async def resources(
    view: View, *, resources_id: str | None, version: int | None, diff: tuple[int, int] | None, limit: int
) -> None:
    """Resources: all ids; the versions of one ID; all of one version; what changed between two.

    Prompts and endpoints are shown, without keys. Of all else the type and the size are: nothing is unpickled.
    """
    if resources_id is None:
        if version is not None or diff:
            raise WrongUse("whose version? Say the id: raystore resources ID --diff 3 7")
        page = await view.store.query_resources(limit=limit, sort_by="update_time", sort_order="desc")
        if view.wants_json:
            view.give({"total": page.total, "resources": page.items})
        elif not page.total:
            view.screen.print("nothing was published")
        else:
            _table(view, list(page.items))
        return
    if diff:
        old, new = [await _version(view, resources_id, number) for number in diff]
        before, after = lines_of(old), lines_of(new)
        name = f"{resources_id} version "
        changed = list(
            difflib.unified_diff(before, after, f"{name}{old.version}", f"{name}{new.version}", lineterm="", n=CONTEXT)
        )
        if view.wants_json:
            view.give({"resources_id": resources_id, "versions": list(diff), "diff": changed})
        else:
            view.screen.print(*(_coloured(line) for line in changed) if changed else ["the two are equal"])
        return
    if version is not None:
        found = await _version(view, resources_id, version)
        if view.wants_json:
            view.give(found)
        else:
            _table(view, [found])
            view.screen.print("", *lines_of(found))
        return
    found = await _versions(view, resources_id, limit)
    if view.wants_json:
        view.give({"versions": found})
        return
    _table(view, found)
    view.screen.print("", *lines_of(found[0]))


def _coloured(line: str) -> Text:
    style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
    return Text(clean(line, 100_000), style=style)
