"""What all commands that read a store have in common: their options, the store, a screen or JSON, the end.

    @reading("raystore groups --status open")
    @click.option("--limit", default=20)
    async def groups(view: View, limit: int) -> None: ...

The body gets a `View`. It says what it has to say to `view.screen`, or with `--json` to `view.give`.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raystore.api import LightningStore
from raystore.cli.drawing import Screen
from raystore.cli.endings import WrongUse
from raystore.cli.finding import NAMESPACE, Where, opened
from raystore.cli.plainly import as_json
from raystore.errors import CursorTooOldError
from raystore.errors.text import meant
from raystore.types.contract import AnyRollout, Change
from raystore.values.closed import pickles_closed

PAGE = 2000  #: rollouts that are read at once
MANY = 20_000  #: rollouts, from which on it is said that they are read
POLL_SECONDS = 30.0  #: that a call waits at the store for something new
BREATH_SECONDS = 0.2  #: between two answers with something new: a busy store would have some at once, all the time
AT_ONCE = 64  #: queries of one kind that are under way together


@dataclass
class View:
    """What a command looks at, and where it says what it sees.

    Attributes:
        store: a store, or a run as its journal has it.
        screen: for people.
        wants_json: whether the answer goes to `give` instead.
        now: the time of the store; of a journal, that of its last change.
        is_journal: whether the store is one that nothing happens in any more.
    """

    store: LightningStore
    screen: Screen
    wants_json: bool
    now: float
    is_journal: bool
    where: Where = field(default_factory=Where)

    def give(self, document: Any) -> None:
        """Write the JSON document of the answer."""
        self.screen.file.write(as_json(document, indent=2) + "\n")

    def give_lines(self, records: Iterable[Any]) -> None:
        """Write a line of JSON for each, of an answer that goes on."""
        self.screen.file.writelines(as_json(record) + "\n" for record in records)
        self.screen.file.flush()

    def age(self, since: float | None) -> float | None:
        """Seconds since a time."""
        return None if since is None else max(self.now - since, 0.0)

    async def rollouts(self, statuses: Collection[str] | None = None) -> AsyncIterator[AnyRollout]:
        """All rollouts with these statuses, page by page, in the order of their creation.

        They are chosen here: a filter would have the store go through all rollouts for each page.
        """
        offset = 0
        while True:
            page = await self.store.query_rollouts(limit=PAGE, offset=offset)
            if not offset and page.total > MANY and sys.stderr.isatty():
                click.echo(f"Reading {page.total:,} rollouts ...", err=True)
            for rollout in page.items:
                if statuses is None or rollout.status in statuses:
                    yield rollout
            offset += len(page.items)
            if not page.items or offset >= page.total:
                return

    async def recent(self, last: int, kinds: Sequence[str] = ()) -> tuple[list[Change], int]:
        """Those of the last changes that are of these kinds, and the cursor behind them."""
        end = int((await self.store.statistics())["changes"])
        cursor = max(end - last, 0)
        if not last:
            return [], end
        try:
            page = await self.store.changes(cursor, kinds=kinds or None, limit=last)
        except CursorTooOldError as error:
            page = await self.store.changes(error.oldest - 1, kinds=kinds or None, limit=last)
        return page.items, max(end, page.cursor or 0)

    async def following(self, *kinds: str, since: int | None = None) -> AsyncIterator[list[Change]]:
        """Changes from now on, or behind a cursor, as they happen; those of one answer of the store together.

        Raises `WrongUse` for a journal, in which nothing happens any more.
        """
        if self.is_journal:
            raise WrongUse("nothing happens in a journal that is read; leave out --follow, or connect to the store")
        return self._following(kinds, int((await self.store.statistics())["changes"]) if since is None else since)

    async def _following(self, kinds: Sequence[str], cursor: int) -> AsyncIterator[list[Change]]:
        while True:
            page = await self.store.changes(cursor, kinds=kinds or None, timeout=POLL_SECONDS)
            self.now = time.time()
            cursor = page.cursor if page.cursor is not None else cursor
            if page.items:
                yield page.items
                await asyncio.sleep(BREATH_SECONDS)


async def all_of(calls: Sequence[Callable[[], Awaitable[Any]]]) -> list[Any]:
    """The answers to many queries, a bounded number of them under way at once."""
    room = asyncio.Semaphore(AT_ONCE)

    async def asked(call: Callable[[], Awaitable[Any]]) -> Any:
        async with room:
            return await call()

    return list(await asyncio.gather(*map(asked, calls)))


Body = Callable[..., Awaitable[None]]


def reading(example: str) -> Callable[[Body], click.Command]:
    """Make a command of a coroutine function that reads a store; its docstring is the help."""

    def made(body: Body) -> click.Command:
        def run(**given: Any) -> None:
            where = Where(given.pop("name"), given.pop("namespace"), given.pop("address"), given.pop("journal"))
            run_on(where, lambda view: body(view, **given), wants_json=given.pop("json"))

        run.__name__, run.__doc__ = body.__name__, body.__doc__
        own = getattr(body, "__click_params__", ())  # what the decorators left, the last one first
        return command_of(run, example, [*reversed(own), *STORE_OPTIONS, JSON])

    return made


def run_on(where: Where, body: Callable[[View], Awaitable[None]], *, wants_json: bool) -> None:
    """Run a coroutine function on the store that is meant."""
    screen = Screen()
    with pickles_closed(), opened(where) as store:

        async def whole() -> None:
            now = time.time()
            if where.journal is not None:
                ended, _ = await View(store, screen, wants_json, now, True).recent(1)
                now = ended[-1].time if ended else now
            await body(View(store, screen, wants_json, now, where.journal is not None, where))

        asyncio.run(whole())


def command_of(function: Callable[..., None], example: str, params: Sequence[click.Parameter]) -> click.Command:
    """Make a command of a function `_name` with these parameters; its docstring is the help."""
    called = function.__name__.strip("_")
    return click.Command(called, callback=function, params=list(params), help=with_example(function.__doc__, example))


def with_example(help: str | None, example: str) -> str:
    """A help text with its example, in a paragraph that is not wrapped."""
    return f"{inspect.cleandoc(help or '')}\n\n\b\nExample:\n  {example}"


#: Of an option that says how many.
COUNT: dict[str, Any] = {"type": click.IntRange(1), "metavar": "N", "show_default": True}
STORE_OPTIONS: list[click.Option] = [
    click.Option(["--name"], envvar="RAYSTORE_NAME", metavar="NAME", help="Name of the store, if there are several."),
    click.Option(
        ["--namespace"], envvar="RAYSTORE_NAMESPACE", default=NAMESPACE, metavar="NAME",
        help=f"Ray's namespace that the store is in; {NAMESPACE} by default.",
    ),
    click.Option(["--address"], metavar="HOST:PORT", help="Ray's address; else RAY_ADDRESS, else the local cluster."),
    click.Option(
        ["--journal"], metavar="DIR", type=click.Path(path_type=Path),
        help="Read a run from its journal: finished, crashed or running.",
    ),
]  # fmt: skip
JSON = click.Option(["--json"], is_flag=True, help="One JSON document (with --follow: one line each).")


if TYPE_CHECKING:
    Parameter = click.ParamType[Any]
else:
    Parameter = click.ParamType  # which older versions of click have not made generic


class Word(Parameter):
    """One of some words; for a typo, the one that was meant."""

    def __init__(self, words: Sequence[str], what: str) -> None:
        self.words: list[str] = list(words)
        self.name = what

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        if value not in self.words:
            self.fail(f"{value!r} is no {self.name}{meant(value, self.words)}; there are {', '.join(self.words)}")
        return value


class Words(Word):
    """Some of these words, separated by commas."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        return [super(Words, self).convert(word.strip(), param, context) for word in value.split(",")]


_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


class Seconds(Parameter):
    """A length of time: 90, 90s, 10m, 2h, 1d."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        if isinstance(value, (int, float)):
            return float(value)
        try:
            return seconds_of(value)
        except ValueError:
            self.fail(f"{value!r} is no length of time; write 90s, 10m or 2h")


def seconds_of(text: str) -> float:
    """The seconds of a length of time. Raises ValueError."""
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    unit = text[len(number) :]
    if unit not in _UNITS or not number or float(number) < 0:
        raise ValueError(text)
    return float(number) * _UNITS[unit]


class Tag(Parameter):
    """A tag: NAME=VALUE. What JSON takes for a number, true or false is one, so that 007 and nan are text."""

    name = "tag"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        name, equals, given = value.partition("=")
        if not name or not equals:
            self.fail(f"{value!r} is no tag; write NAME=VALUE, as in --tag env=math")
        try:
            found = json.loads(given, parse_constant=str)
        except ValueError:
            return name, given
        is_value = isinstance(found, int) or (isinstance(found, float) and math.isfinite(found))
        return name, found if is_value else given


def environment_of(rollout: Any) -> str:
    """Where the task of a rollout is from: its tag "env", else the stream in the id of its group, else its queue."""
    if "env" in rollout.tags:
        return str(rollout.tags["env"])
    parts = (rollout.group_id or "").split("/")
    if len(parts) == 4:  # feed/environment/epoch/index
        return parts[1]
    return parts[0] if len(parts) == 3 else f"queue {rollout.queue}"


def attempt_of(rollout: Any) -> Any:
    """The latest attempt of a rollout; None if it has none."""
    return getattr(rollout, "attempt", None)


def took(rollout: Any, now: float) -> float | None:
    """How long the latest attempt of a rollout took, or takes so far."""
    attempt = attempt_of(rollout)
    if attempt is None:
        return None
    return float(max((attempt.end_time or now) - attempt.start_time, 0.0))
