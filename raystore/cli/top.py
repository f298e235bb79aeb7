"""`raystore top`: a live page on a store, with keys.

Each refresh is three reads, all of counters and bounded lists. What is shown is drawn from a `Page`, so that the
picture follows from what was read alone; keys change what is shown of it.
Not here: one rollout (`show`), which enter opens.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import sys
import termios
import threading
import tty
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import click
from rich.console import Group
from rich.table import Table
from rich.text import Text

from raystore.cli.drawing import text_of
from raystore.cli.reading import Seconds, View, reading
from raystore.cli.show import show_rollout
from raystore.cli.text import clean, duration, figure, share, size, sparkline
from raystore.errors import StoreError

LAST_SECONDS = 300.0  #: that rates and quantiles are of
WORKERS = 1_000  #: runners that are read, those first that were heard of last
VERSIONS = 60  #: of the policy in the curve of rewards
ALL = 100_000  #: rows of a page that is no terminal's
SHORTEST_SECONDS = 0.1  #: between two refreshes
WAIT_SECONDS = 3600.0  #: for a key, below a rollout
SORTS = ("longest", "runner", "heard")
KEYS = "q quit   s sort   / filter   up down choose   enter open   p pause"


@dataclass
class Place:
    """A place of a runner, or a runner that says nothing of its places."""

    runner: str
    heard: float | None  # seconds since
    rollout_id: str | None = None
    seconds: float | None = None  # for which the rollout runs
    span: str | None = None  # the newest open one
    span_seconds: float | None = None

    @property
    def text(self) -> str:
        """What a filter looks into."""
        return f"{self.runner} {self.rollout_id or ''} {self.span or ''}".lower()


@dataclass
class Page:
    """What one refresh has read."""

    told: dict[str, Any]  # statistics
    metrics: dict[str, Any]
    places: list[Place]
    workers: int
    now: float
    is_journal: bool = False

    @property
    def seconds(self) -> float:
        """The time that rates are of: since the first of what is counted."""
        buckets = self.metrics["buckets"]
        first = buckets[0]["time"] if buckets else self.now
        return float(min(max(self.now - first, self.metrics["bucket_seconds"]), LAST_SECONDS))


@dataclass
class Choice:
    """What the keys have chosen."""

    sort: int = 0
    pattern: str = ""
    is_typing: bool = False
    is_paused: bool = False
    row: int = 0  # -1: none can be chosen, since there are no keys
    opened: str | None = None
    shown: list[Place] = field(default_factory=list)

    def press(self, key: str) -> bool:
        """Take a key; whether the page stays."""
        if self.is_typing:
            if key in ("\r", "\n", "\x1b"):
                self.is_typing = False
                self.pattern = "" if key == "\x1b" else self.pattern
            elif key in ("\x7f", "\b"):
                self.pattern = self.pattern[:-1]
            elif key.isprintable() and len(key) == 1:
                self.pattern += key
            return True
        match key:
            case "q" | "\x03":
                return False
            case "s":
                self.sort = (self.sort + 1) % len(SORTS)
            case "/":
                self.is_typing, self.pattern = True, ""
            case "p":
                self.is_paused = not self.is_paused
            case "\x1b[A" | "k":
                self.row = max(self.row - 1, 0)
            case "\x1b[B" | "j":
                self.row += 1
            case "\r" | "\n":
                chosen = self.shown[self.row] if self.row < len(self.shown) else None
                self.opened = chosen.rollout_id if chosen is not None else None
        return True

    def select(self, places: list[Place]) -> list[Place]:
        """The places that match, in order."""
        wanted = self.pattern.lower()
        kept = [place for place in places if wanted in place.text]
        keys: list[Callable[[Place], Any]] = [
            lambda place: (place.seconds is None, -(place.seconds or 0.0)),
            lambda place: (place.runner, -(place.seconds or 0.0)),
            lambda place: -(place.heard or 0.0),
        ]
        self.shown = sorted(kept, key=keys[self.sort])
        self.row = min(self.row, len(self.shown) - 1) if self.row >= 0 and self.shown else min(self.row, 0)
        return self.shown


# -- reading -----------------------------------------------------------------------------------------------------------


async def read(view: View) -> Page:
    """The page as it is now."""
    told: dict[str, Any] = dict(await view.store.statistics())
    metrics: dict[str, Any] = dict(await view.store.metrics(seconds=LAST_SECONDS, versions=VERSIONS))
    found = await view.store.query_workers(sort_by="last_dequeue_time", sort_order="desc", limit=WORKERS)
    now = metrics["time"] if not view.is_journal else view.now
    places = [place for worker in found.items for place in places_of(worker, now)]
    return Page(told, metrics, places, found.total, now, view.is_journal)


def places_of(worker: Any, now: float) -> Iterator[Place]:
    """The places of a runner, as its last heartbeat says; without one, the rollout that it works on."""

    def since(time: Any) -> float | None:
        return max(now - time, 0.0) if isinstance(time, (int, float)) else None

    heard = since(worker.last_heartbeat_time)
    stats = worker.heartbeat_stats if isinstance(worker.heartbeat_stats, dict) else {}
    told = stats.get("places")
    if not isinstance(told, list) or not told:
        rollout_id = worker.current_rollout_id
        yield Place(worker.worker_id, heard, rollout_id, since(worker.last_busy_time) if rollout_id else None)
        return
    for one in told:
        if isinstance(one, dict):
            yield Place(
                worker.worker_id, heard, one.get("rollout_id"), since(one.get("since")), one.get("span"),
                since(one.get("span_since")),
            )  # fmt: skip


# -- drawing -----------------------------------------------------------------------------------------------------------


def draw(page: Page, choice: Choice, *, name: str, width: int, height: int) -> Group:
    """The page as it fits a terminal of this size."""
    lines: list[Any] = [_head(page, name), *(Text(line, overflow="ellipsis", no_wrap=True) for line in _summary(page))]
    curve = _rewards(page, width)
    if curve:
        lines.append(curve)
    consumers = _consumers(page)
    if consumers is not None:
        lines.append(consumers)
    used = len(lines) + (consumers.row_count if consumers is not None else 0)
    lines.append(_places(page, choice, max(height - used - 3, 1), width))
    if choice.row >= 0:
        lines.append(Text(_foot(choice), style="dim", overflow="ellipsis", no_wrap=True))
    return Group(*lines)


def _foot(choice: Choice) -> str:
    if choice.is_typing:
        return f"filter: {choice.pattern}_"
    said = [KEYS, f"filter {choice.pattern!r}" if choice.pattern else "", "PAUSED" if choice.is_paused else ""]
    return "   ".join(filter(None, said))


def _head(page: Page, name: str) -> Text:
    rollouts = page.told["rollouts_by_status"]
    counts = "  ".join(f"{rollouts[status]:,} {status}" for status in rollouts if rollouts[status])
    return Text.assemble((clean(name), "bold"), "  ", counts or "no rollouts", overflow="ellipsis", no_wrap=True)


def _summary(page: Page) -> list[str]:
    told, metrics = page.told, page.metrics
    total = metrics["total"]
    finished = sum(total["finished"].values())
    failed = {outcome: count for outcome, count in total["finished"].items() if outcome != "ok"}
    queues = ", ".join(f"{clean(queue)} {count:,}" for queue, count in sorted(told["queue_lengths"].items()) if count)
    took = total["durations"]
    lines = [f"queued    {queues or 'nothing'}" + ("   PAUSED" if told["paused"] else "")]
    lines.append(
        f"finished  {finished / page.seconds:.2f} a second"
        + (f"   took {duration(took['p50'])}, 90 % within {duration(took['p90'])}" if took["count"] else "")
        + (f"   waited {duration(total['waits']['p50'])}" if total["waits"]["count"] else "")
    )
    bad = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(failed.items(), key=lambda pair: -pair[1]))
    again = ", ".join(f"{count:,} {outcome}" for outcome, count in total["retried"].items())
    if bad or again:
        lines.append(f"failed    {bad or 'none'}" + (f"   tried again {again}" if again else ""))
    memory = metrics["memory"]
    of = f" of {size(memory['eviction_threshold'])} ({share(memory['total'], memory['eviction_threshold'])})"
    lines.append(
        f"memory    spans {size(memory['spans'])}, values {size(memory['values'])}{'' if page.is_journal else of}"
        + ("   FULL" if told["memory_full"] else "")
    )
    held = [(cause, part) for cause, part in metrics["shares"].items() if part >= 0.05]
    if held:
        ranked = sorted(held, key=lambda pair: -pair[1])
        lines.append("limits    " + ", ".join(f"{cause.replace('_', ' ')} {part:.0%}" for cause, part in ranked))
    return lines


def _rewards(page: Page, width: int) -> Text | None:
    points = sorted(page.metrics["rewards"], key=lambda point: point["version"] if point["version"] is not None else -1)
    means = [point["mean"] for point in points if point["mode"] in ("train", "") and point["mean"] is not None]
    vals = [point["mean"] for point in points if point["mode"] == "val" and point["mean"] is not None]
    if not means and not vals:
        return None
    text = f"reward    {sparkline(means, max(width - 50, 10))} {figure(means[-1])}" if means else "reward    "
    if vals:
        text += f"   validation {sparkline(vals, 12)} {figure(vals[-1])}"
    return Text(text, overflow="ellipsis", no_wrap=True)


def _consumers(page: Page) -> Table | None:
    known = page.told["consumers"]
    if not known:
        return None
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("consumer", "awaits", "open", "waited", "checkpoint"):
        table.add_column(title, justify="left" if title == "consumer" else "right", no_wrap=True, overflow="ellipsis")
    looked, waited = page.metrics["sampled_seconds"], page.metrics["waited_seconds"]
    for name, told in list(known.items())[:5]:
        table.add_row(
            text_of(name), f"{told['awaited']:,}", str(len(told["open"])), share(waited.get(name, 0.0), looked) or "0%",
            "" if told["checkpoint"] is None else str(told["checkpoint"]),
        )  # fmt: skip
    return table


def _places(page: Page, choice: Choice, room: int, width: int) -> Table:
    shown = choice.select(page.places)
    first = max(min(choice.row - room // 2, len(shown) - room), 0)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    busy = sum(place.rollout_id is not None for place in page.places)
    title = f"runner ({page.workers:,}; {busy:,} of {len(page.places):,} places work)"
    columns = [(title, False), ("heard", True), ("rollout", False), ("for", True), ("in span", False), ("for", True)]
    kept = len(columns) if width >= 100 else 5 if width >= 80 else 4 if width >= 60 else 3
    for name, right in columns[:kept]:
        table.add_column(name, justify="right" if right else "left", no_wrap=True, overflow="ellipsis")
    for number, place in enumerate(shown[first : first + room], first):
        texts = [place.runner, duration(place.heard), place.rollout_id, duration(place.seconds)]
        texts += [place.span, duration(place.span_seconds)]
        table.add_row(*map(text_of, texts[:kept]), style="reverse" if number == choice.row else "")
    return table


# -- the terminal ------------------------------------------------------------------------------------------------------


class Keyboard:
    """The keys that are pressed, while a block runs; the terminal is as before afterwards."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._keys: asyncio.Queue[str] = asyncio.Queue()
        self._is_over = threading.Event()

    @contextlib.contextmanager
    def listening(self) -> Iterator[Keyboard]:
        """Read keys one by one, without echo."""
        file = sys.stdin.fileno()
        before = termios.tcgetattr(file)
        tty.setcbreak(file)
        thread = threading.Thread(target=self._read, args=(file,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._is_over.set()
            thread.join(1.0)
            termios.tcsetattr(file, termios.TCSADRAIN, before)

    def _read(self, file: int) -> None:
        while not self._is_over.is_set():
            if not select.select([file], [], [], 0.1)[0]:
                continue
            data = os.read(file, 32).decode(errors="replace")
            keys = [data] if data.startswith("\x1b[") else list(data)
            for key in keys or ["q"]:  # the terminal is gone
                self._loop.call_soon_threadsafe(self._keys.put_nowait, key)
            if not data:
                return

    async def pressed(self, within: float) -> AsyncIterator[str]:
        """The keys of the next seconds, until there is none for a moment."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                yield await self._keys.get()
        while not self._keys.empty():
            yield self._keys.get_nowait()


@reading("raystore top --interval 1s")
@click.option("--interval", type=Seconds(), default=2.0, show_default="2s", help="Between two refreshes.")
@click.option("--once", is_flag=True, help="One page, and the end; so it is without a terminal.")
async def top(view: View, *, interval: float, once: bool) -> None:
    """A live page: queues, rates, failures, rewards, consumers, memory, and what each place of the runners does."""
    page = await read(view)
    if view.wants_json:
        view.give({"statistics": page.told, "metrics": page.metrics, "places": [*map(asdict, page.places)]})
        return
    info = getattr(view.store, "info", None)
    name = (
        f"journal {view.where.journal}" if view.is_journal else f"store {getattr(info, 'name', None) or 'in process'}"
    )
    screen = view.screen
    if once or view.is_journal or not screen.is_terminal or not sys.stdin.isatty():
        screen.draw(draw(page, Choice(row=-1), name=name, width=screen.width, height=ALL))
        return
    with Keyboard().listening() as keyboard:
        await _live(view, keyboard, page, name, max(interval, SHORTEST_SECONDS))


async def _live(view: View, keyboard: Keyboard, page: Page, name: str, interval: float) -> None:
    """Refresh the page until a key ends it; enter shows a rollout until the next key."""
    screen, choice = view.screen, Choice()

    def picture() -> Group:
        return draw(page, choice, name=name, width=screen.width, height=screen.height)

    while True:
        with screen.live(picture()) as live:
            while choice.opened is None:
                async for key in keyboard.pressed(interval):
                    if not choice.press(key):
                        return
                if not choice.is_paused:
                    page = await read(view)
                live.update(picture(), refresh=True)
        opened, choice.opened = choice.opened, None
        try:
            await show_rollout(view, opened)
        except (StoreError, click.ClickException) as error:  # it was deleted meanwhile
            screen.print(str(error))
        screen.print("", "any key goes back")
        async for _ in keyboard.pressed(WAIT_SECONDS):
            break
