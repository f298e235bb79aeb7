"""The command `export`: rollouts, spans and groups out of a store, or out of the journal of a run, for other programs.

It says what went where in one line, and what went wrong in one line.
Not here: how a format stands (`records`, `groups`, `perfetto`, `otlp`, `parquet`), where it goes (`targets`).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import shutil
import time
import zlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from raystore.cli.endings import WrongUse
from raystore.cli.exports import source
from raystore.cli.exports.source import FINISHED, GROUP_STATUSES, UNFINISHED, Filters, Place, Whole
from raystore.cli.exports.targets import Collector, CursorFile, ExportError, Lines, Parquet, Target, Trace
from raystore.cli.finding import Where, opened
from raystore.cli.reading import STORE_OPTIONS, Tag, seconds_of
from raystore.client.local import RecoveredRun
from raystore.errors.text import either, meant
from raystore.reports.log import escaped
from raystore.reports.progress import Progress
from raystore.values.closed import pickles_closed

FORMATS = ("jsonl", "parquet", "trace", "otlp")
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".json": "trace"}
_MODES = ("train", "val", "test")


@dataclass(frozen=True)
class Plan:
    """What is exported, and where it goes.

    Attributes:
        to: a file, a directory, or the address of a collector.
        format: of `FORMATS`.
        of_groups: groups to train on, in place of rollouts.
        filters: which of them.
        headers: of requests to a collector.
        is_openinference: whether spans get the attributes that Phoenix shows.
        cursor: the file that says how far it is.
        is_anew: begin anew, and replace what is there.
    """

    to: str
    format: str
    of_groups: bool
    filters: Filters
    headers: Mapping[str, str]
    is_openinference: bool
    cursor: Path
    is_anew: bool

    @property
    def path(self) -> Path:
        """The file that is written; of Parquet in a directory, that directory."""
        path = Path(self.to)
        if path.suffix in _SUFFIXES or self.format == "parquet":
            return path
        return path / f"{'groups' if self.of_groups else 'rollouts'}{'.json' if self.format == 'trace' else '.jsonl'}"

    @property
    def single(self) -> Path | None:
        """The one file of Parquet; None for a directory of them, or another format."""
        return self.path if self.format == "parquet" and self.path.suffix == ".parquet" else None

    def target(self) -> Target:
        """Where it goes. Raises `ExportError`, and ModuleNotFoundError, with what to install."""
        if self.format == "otlp":
            return Collector(self.to, self.headers, is_openinference=self.is_openinference)
        if self.format == "trace":
            return Trace(self.path)
        if self.format == "jsonl":
            return Lines(self.path)
        parts = self.path if self.single is None else self.path.with_name(f"{self.path.name}.parts")
        return Parquet(parts, of_groups=self.of_groups, single=self.single)

    def what(self, store: Any) -> dict[str, Any]:
        """What tells this export from another one that the cursor file may be of."""
        filters = self.filters
        told: dict[str, Any] = {
            "format": self.format, "groups": self.of_groups, "status": list(filters.status), "mode": filters.mode,
            "tags": dict(filters.tags), "since": filters.since is not None,
        }  # fmt: skip
        if self.format == "otlp":  # the cursor file of a file stands beside it, and is moved with it
            told["to"] = self.to
        if isinstance(store, RecoveredRun):
            told["store"] = store.store_id
        elif (info := getattr(store, "info", None)) is not None:
            told["store"] = info.store_id
        return told


# -- doing it ----------------------------------------------------------------------------------------------------------


async def export_to(store: Any, plan: Plan) -> str:
    """Export from a store; what was done, in a sentence. Raises `ExportError`, ModuleNotFoundError and `StoreError`."""
    target = plan.target()
    cursor = CursorFile(plan.cursor, plan.what(store))
    if plan.is_anew:
        _remove(plan)
    elif not cursor.load():
        _refuse_to_replace(plan)
    began = cursor.count
    target.begin(cursor.state)
    cursor.save(
        cursor.place, await target.commit(), cursor.count
    )  # so that a kill before the first page is gone on from
    noun = "groups" if plan.of_groups else "rollouts"
    try:
        with Progress(f"exporting {noun}", await _how_many(store, plan)) as shown:
            shown.update(cursor.count)
            if plan.of_groups:
                await _export_groups(store, plan, target, cursor, shown)
                more = 0
            else:
                await _export_finished(store, plan, target, cursor, shown)
                more = await _export_unfinished(store, plan, target, cursor, shown)
            if plan.single is not None:  # before the parts go: what is begun again then begins anew
                plan.cursor.unlink(missing_ok=True)
            await target.end()
    finally:
        target.close()
    return _told(plan, target, cursor.count - began, more, began)


async def _export_finished(store: Any, plan: Plan, target: Target, cursor: CursorFile, shown: Progress) -> None:
    count, place = cursor.count, cursor.place
    async for page, place in source.finished(store, plan.filters, cursor.place):
        async for one in source.whole(store, page):
            await target.take(one)
            count += 1
            shown.update(count)
        if target.is_due:
            cursor.save(place, await target.commit(), count)
    cursor.save(place, await target.commit(), count)


async def _export_unfinished(store: Any, plan: Plan, target: Target, cursor: CursorFile, shown: Progress) -> int:
    """Those that have not finished; the cursor stays before them, so that another export replaces them."""
    count = 0
    async for page in source.unfinished(store, plan.filters):
        async for one in source.whole(store, page):
            await target.take(one)
            count += 1
            shown.update(cursor.count + count)
    return count


async def _export_groups(store: Any, plan: Plan, target: Target, cursor: CursorFile, shown: Progress) -> None:
    at = cursor.place or {"offset": 0, "ids": [], "open": []}
    place, left_open, count = Place(at["offset"], at["ids"]), set(at["open"]), cursor.count

    async def commit() -> None:
        state = {"offset": place.offset, "ids": list(place.ids), "open": sorted(left_open)}
        cursor.save(state, await target.commit(), count)

    async for page in source.groups(store, plan.filters, place, left_open):
        async for group, members in _members(store, page):
            await target.take_group(group, members)
            count += 1
            shown.update(count)
        if target.is_due:
            await commit()
    await commit()


async def _members(store: Any, groups: Sequence[Any]) -> AsyncIterator[tuple[Any, list[Whole]]]:
    for group in groups:
        yield group, await source.members(store, group)


async def _how_many(store: Any, plan: Plan) -> int | None:
    """How many there are of the statuses that are wanted, before the other filters."""
    counts = await store.statistics()
    by_status = counts["groups_by_status" if plan.of_groups else "rollouts_by_status"]
    return sum(by_status.get(status, 0) for status in plan.filters.status) or None


def _remove(plan: Plan) -> None:
    """Remove what an earlier export has written."""
    plan.cursor.unlink(missing_ok=True)
    if plan.format == "otlp":
        return
    if plan.format == "parquet" and plan.single is None:
        for part in plan.path.glob("part-*.parquet"):
            part.unlink()
        return
    plan.path.unlink(missing_ok=True)
    shutil.rmtree(plan.path.with_name(f"{plan.path.name}.parts"), ignore_errors=True)


def _refuse_to_replace(plan: Plan) -> None:
    """Raise `ExportError` if there is something that this export did not begin."""
    if plan.format == "otlp":
        return
    there = list(plan.path.glob("part-*.parquet")) if plan.path.is_dir() else [plan.path] * plan.path.exists()
    if there:
        raise ExportError(
            f"{there[0]} is there, and no cursor file {plan.cursor} from which it could go on; "
            "take another place, or say --anew to replace it"
        )


def _told(plan: Plan, target: Target, count: int, more: int, before: int) -> str:
    noun = ("group" if plan.of_groups else "rollout") + "s" * (count != 1)
    told = f"{count:,} {noun} to {plan.to if plan.format == 'otlp' else plan.path}"
    if more:
        told += f", and {more:,} that have not finished"
    if before:
        told += f"; {before:,} were there before"
    if isinstance(target, Collector):
        told += f" ({target.sent:,} spans)"
        if target.rejected[0]:
            told += f"; it refused {target.rejected[0]:,} of them: {target.rejected[1]}"
    return told


# -- what the user says ------------------------------------------------------------------------------------------------


def plan_of(
    to: str,
    *,
    format: str | None,
    groups: bool,
    status: str | None,
    mode: str | None,
    tags: Sequence[tuple[str, Any]],
    since: str | None,
    headers: Sequence[str],
    openinference: bool,
    cursor: Path | None,
    anew: bool,
    now: float,
) -> Plan:
    """The plan of what the options say. Raises `ExportError`."""
    is_url = "://" in to
    if format is None:
        format = "otlp" if is_url else _format_of(to)
    if is_url != (format == "otlp"):
        raise ExportError(
            f"format {format} does not go to {to!r}: otlp goes to the address of a collector, as "
            "http://localhost:4318, and every other one to a file or directory"
        )
    if (suffix := _SUFFIXES.get(Path(to).suffix, format)) != format and not is_url:
        raise ExportError(f"{to!r} is named as {suffix} is; with --format {format} take another name, or a directory")
    if groups and format not in ("jsonl", "parquet"):
        raise ExportError(f"--groups makes rows to train on, as jsonl or parquet, and not {format}")
    if (headers or openinference) and format != "otlp":
        raise ExportError("--header and --openinference are for a collector, and --to is none: http://localhost:4318")
    wanted = _statuses(status, groups)
    if format == "otlp" and (open_ones := [one for one in wanted if one in UNFINISHED]):
        raise ExportError(f"a collector takes what has ended, and not {either(open_ones)}")
    filters = Filters(wanted, mode, dict(tags), None if since is None else _time(since, now))
    name = f"raystore-export-{zlib.crc32(to.encode()):08x}.cursor"
    plan = Plan(to, format, groups, filters, dict(map(_header, headers)), openinference, Path(name), anew)
    if cursor is None and format != "otlp":
        in_directory = format == "parquet" and plan.single is None
        cursor = plan.path / "_export.cursor" if in_directory else plan.path.with_name(f"{plan.path.name}.cursor")
    return plan if cursor is None else Plan(**{**vars(plan), "cursor": cursor})


def _format_of(to: str) -> str:
    """The format that the name of a file says; Parquet for a directory."""
    path = Path(to)
    if path.suffix in _SUFFIXES:
        return _SUFFIXES[path.suffix]
    if path.suffix and not to.endswith("/") and not path.is_dir():
        known = either(list(_SUFFIXES))
        raise ExportError(f"{to!r} does not say a format; name it {known}, or with / at its end for a directory")
    return "parquet"


def _statuses(given: str | None, of_groups: bool) -> tuple[str, ...]:
    known = GROUP_STATUSES[1:] if of_groups else (*FINISHED, *UNFINISHED)
    if given is None:
        return known if of_groups else FINISHED
    found = tuple(word.strip() for word in given.split(","))
    for word in found:
        if word not in known:
            what = "a group that has ended" if of_groups else "a rollout"
            raise ExportError(
                f"--status {word!r} is no status of {what}; there are {either(known)}{meant(word, known)}"
            )
    return found


def _header(given: str) -> tuple[str, str]:
    name, equals, value = given.partition("=")
    if (
        not equals
        or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name)
        or not value.isascii()
        or not value.isprintable()
    ):
        raise ExportError(f"--header {given!r} is no header; write NAME=VALUE, as --header authorization='Bearer ...'")
    return name, value


def _time(given: str, now: float) -> float:
    """A time: of a day, in seconds since the epoch, or so long ago."""
    if given[-1:].isalpha():
        with contextlib.suppress(ValueError):  # else it is none, which is told below
            return now - seconds_of(given)
    try:
        found = float(given)
    except ValueError:
        try:
            found = datetime.fromisoformat(given).timestamp()
        except ValueError:
            found = math.nan
    if not math.isfinite(found):
        raise ExportError(
            f"--since {given!r} is no time; write 2h, 30m or 7d, or 2026-11-30T12:00, or seconds since 1970"
        )
    return found


_HELP = """Write rollouts and spans for other programs.

\b
FILE.jsonl      a rollout on each line, with its attempts, spans and rewards
DIR, or FILE.parquet    the same for pyarrow, polars, pandas, DuckDB
FILE.json       a trace for ui.perfetto.dev: who did what when
http://HOST     spans to a collector of OpenTelemetry, as OTLP over HTTP

With --groups it writes groups to train on: rewards, token ids and log-probabilities of each, as
datasets.load_dataset("json", data_files=FILE) reads them.

What has finished is exported; --status names others. An export that was interrupted goes on where it was if you say
the same again, and one that is complete goes on with what has finished since. Nothing is unpickled: what only a
pickle holds is told by type and size.

\b
Example:
  raystore export --to runs/rollouts.jsonl --mode train --since 2h
"""


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of an export, and those that say which store is meant."""
    command.__click_params__ = [*reversed(STORE_OPTIONS)]  # type: ignore[attr-defined]  # click reads them backwards
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


_OPTIONS = [
    click.option("--to", required=True, metavar="FILE|DIR|URL", help="Where it goes; the name says the format."),
    click.option("--format", type=click.Choice(FORMATS), help="The format, if the name does not say it."),
    click.option("--groups", is_flag=True, help="Groups to train on, in place of rollouts."),
    click.option("--status", metavar="STATUS,...", help="Only these; unless said, all that have finished."),
    click.option("--mode", type=click.Choice(_MODES), help="Only of this mode."),
    click.option(
        "--tag", "tags", type=Tag(), multiple=True, metavar="NAME=VALUE", help="Only with this tag; may be repeated."
    ),
    click.option(
        "--since", metavar="TIME", help="Only what ended since: 2h, 7d, 2026-11-30T12:00, seconds since 1970."
    ),
    click.option("--header", "headers", multiple=True, metavar="NAME=VALUE", help="Of requests to a collector."),
    click.option("--openinference", is_flag=True, help="Name calls of models, tools and agents as Phoenix shows them."),
    click.option("--cursor", type=click.Path(path_type=Path), metavar="FILE", help="Where to note how far it is."),
    click.option("--anew", is_flag=True, help="Begin anew, and replace what is there."),
]


async def export_from(store: Any, **given: Any) -> str:
    """Export from a store as the options say; what was done. Raises `WrongUse` in one line, and what a store raises."""
    try:
        plan = plan_of(**given, now=time.time())
        return escaped(f"exported {await export_to(store, plan)}")
    except (ExportError, ModuleNotFoundError) as error:
        raise WrongUse(escaped(str(error))) from None
    except OSError as error:
        raise WrongUse(escaped(f"cannot write {given['to']}: {error}")) from None


@click.command("export", help=_HELP)
@options
def export(**given: Any) -> None:
    """Write rollouts and spans for other programs."""
    where = Where(*(given.pop(option) for option in ("name", "namespace", "address", "journal")))
    try:
        with pickles_closed(), opened(where) as store:
            click.echo(asyncio.run(export_from(store, **given)))
    except KeyboardInterrupt:
        click.echo("interrupted; say the same again, and it goes on where it was", err=True)
        raise
