"""`raystore watch`: wait until a run goes wrong, and say so to whatever waits for this process, or to a URL.

A condition compares a figure of the last rollouts with a bound. Nothing is polled: the store is asked for changes, and
the answer comes with the next one, or when a bound on idling could be passed.
"""

from __future__ import annotations

import asyncio
import re
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from raystore.cli.endings import BAD_NEWS, WrongUse
from raystore.cli.errors import INFRASTRUCTURE
from raystore.cli.plainly import as_json
from raystore.cli.reading import BREATH_SECONDS, POLL_SECONDS, Parameter, Seconds, View, attempt_of, reading, seconds_of
from raystore.cli.text import duration, figure
from raystore.core.lifecycle import RolloutStatus
from raystore.errors.text import meant
from raystore.types.contract import Change

WINDOW = 100  #: finished rollouts that a condition looks at, unless it says another number
LEAST_SECONDS = 0.2  #: between two looks at the clock
WEBHOOK_SECONDS = 10.0

FIGURES = {
    "errors": "share of failed rollouts among the last finished ones",
    "infra": "share of those that the infrastructure failed",
    "reward": "mean reward of the last finished rollouts",
    "seconds": "mean seconds that the last finished rollouts took",
    "idle": "time since a rollout was claimed or finished",
    "queue": "rollouts that wait",
}


class Condition(Parameter):
    """FIGURE>BOUND or FIGURE<BOUND, with @N for the last N finished rollouts."""

    name = "condition"
    _FORM = re.compile(r"^\s*([a-z]+)\s*([<>])\s*([0-9.]+[a-z]*)\s*(?:@\s*([0-9]+))?\s*$")

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        if isinstance(value, Check):
            return value
        found = self._FORM.match(value)
        if found is None:
            self.fail(f"{value!r} is no condition; write errors>0.2, idle>10m or reward<0.1@50")
        name, sign, bound, window = found.groups()
        if name not in FIGURES:
            self.fail(f"{name!r} is no figure{meant(name, FIGURES)}; there are {', '.join(FIGURES)}")
        if window is not None and (name in ("idle", "queue") or int(window) < 1):
            self.fail(f"{value!r}: @N counts finished rollouts, 1 or more, which {name} does not look at")
        try:
            limit = seconds_of(bound) if name in ("idle", "seconds") else float(bound)
        except ValueError:
            self.fail(f"{bound!r} in {value!r} is no bound; write errors>0.2, idle>10m or reward<0.1@50")
        return Check(value.strip(), name, sign, limit, int(window) if window else WINDOW)


@dataclass(frozen=True)
class Check:
    """One condition: the run has gone wrong if it holds."""

    text: str
    figure: str
    sign: str
    bound: float
    window: int

    def holds(self, value: float | None) -> bool:
        """Whether a value of the figure is beyond the bound; an unknown one is not."""
        return value is not None and (value > self.bound if self.sign == ">" else value < self.bound)


@dataclass(frozen=True)
class Ended:
    """What conditions need to know of a finished rollout."""

    rollout_id: str
    failed: bool
    by_infrastructure: bool
    reward: float | None
    seconds: float | None


def ended(rollout: Any) -> Ended:
    """The same of a rollout as the store has it."""
    attempt = attempt_of(rollout)
    seconds = None if attempt is None or attempt.end_time is None else attempt.end_time - attempt.start_time
    outcome = attempt.outcome if attempt is not None else None
    failed = rollout.status == "failed"
    return Ended(rollout.rollout_id, failed, failed and outcome in INFRASTRUCTURE, rollout.reward, seconds)


def value_of(check: Check, last: Sequence[Ended], idle: float | None, waiting: int) -> float | None:
    """The figure of a condition now; None while fewer rollouts have finished than it looks at."""
    if check.figure == "idle":
        return idle
    if check.figure == "queue":
        return float(waiting)
    window = list(last)[-check.window :]
    if len(window) < check.window:
        return None
    if check.figure == "errors":
        return sum(one.failed for one in window) / len(window)
    if check.figure == "infra":
        return sum(one.by_infrastructure for one in window) / len(window)
    values = [one.reward if check.figure == "reward" else one.seconds for one in window]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


async def _last_finished(view: View, count: int) -> deque[Ended]:
    page = await view.store.query_rollouts(status_in=COUNTED, sort_by="end_time", sort_order="desc", limit=count)
    return deque([ended(one) for one in reversed(page.items)], maxlen=count)


#: Statuses of rollouts that conditions look at: not what somebody has cancelled.
COUNTED: tuple[RolloutStatus, ...] = ("succeeded", "failed")
ACTIVITY: tuple[str, ...] = ("claimed", "running", "succeeded", "failed", "requeuing", "cancelled")


@reading('raystore watch --fail-on "errors>0.2" --fail-on "idle>10m" --fail-on "reward<0.1@50"')
@click.option(
    "--fail-on", "checks", type=Condition(), multiple=True, required=True, metavar="CONDITION", help="May be repeated."
)
@click.option("--webhook", metavar="URL", help="POST what happened there as JSON.")
@click.option(
    "--for", "longest", type=Seconds(), metavar="DURATION", help="Watch for so long at most; then exit with 0."
)
@click.option("--once", is_flag=True, help="Look once, and exit.")
async def watch(view: View, *, checks: Sequence[Check], webhook: str | None, longest: float | None, once: bool) -> None:
    """Wait until a run goes wrong: exit with 1 when a condition holds.

    Figures: errors and infra (shares of the last finished rollouts), reward and seconds (their means), idle (time since
    anything was claimed or finished), queue (rollouts that wait). They look at the last 100 finished rollouts, or the
    last N with @N, and hold no sooner than so many have finished. A journal is looked at once.
    """
    if webhook is not None and not webhook.startswith(("http://", "https://")):
        raise WrongUse(f"--webhook {webhook!r} is no URL; it begins with http:// or https://")
    once = once or view.is_journal
    until = time.monotonic() + longest if longest is not None else None
    statistics = await view.store.statistics()
    cursor: int | None = int(statistics["changes"])
    last = await _last_finished(view, max(check.window for check in checks))
    recent, _ = await view.recent(1000, ACTIVITY)
    active_at = recent[-1].time if recent else view.now
    while True:
        now = view.now if view.is_journal else time.time()
        idle = max(now - active_at, 0.0)
        waiting = int((await view.store.statistics())["queue_length"])
        figures = {check.text: value_of(check, last, idle, waiting) for check in checks}
        for check in checks:
            if check.holds(figures[check.text]):
                await _bad_news(view, check, figures[check.text], last, webhook)
        if once or (until is not None and time.monotonic() >= until):
            _good_news(view, checks, figures)
            return
        page = await view.store.changes(cursor, kinds=ACTIVITY, timeout=_patience(checks, idle, until))
        cursor = page.cursor if page.cursor is not None else cursor
        if page.items:
            active_at = max(active_at, page.items[-1].time)
            await _add_finished(view, page.items, last)
            await asyncio.sleep(BREATH_SECONDS)


async def _add_finished(view: View, changes: Sequence[Change], last: deque[Ended]) -> None:
    """Put the rollouts that have finished behind the last ones; one that finishes again stands only there."""
    ids = list(dict.fromkeys(one.rollout_id for one in changes if one.kind in COUNTED and one.rollout_id))
    found = {one.rollout_id: one for one in await view.store.query_rollouts(rollout_id_in=ids)} if ids else {}
    before = [one for one in last if one.rollout_id not in found]
    last.clear()
    last.extend([*before, *(ended(found[one]) for one in ids if one in found)])


def _patience(checks: Sequence[Check], idle: float, until: float | None) -> float:
    """How long to wait for a change: no longer than until a bound on idling is passed, or the time is over."""
    waits = [POLL_SECONDS]
    waits += [check.bound - idle for check in checks if check.figure == "idle" and check.sign == ">"]
    if until is not None:
        waits.append(until - time.monotonic())
    return max(min(waits), LEAST_SECONDS)


def _shown(check: Check, value: float | None) -> str:
    return duration(value) if check.figure in ("idle", "seconds") else figure(value)


def _good_news(view: View, checks: Sequence[Check], figures: dict[str, float | None]) -> None:
    if view.wants_json:
        view.give({"holds": None, "figures": figures})
        return
    for check in checks:
        value = figures[check.text]
        view.screen.print(
            f"{check.text}: no, it is {_shown(check, value)}" if value is not None else f"{check.text}: not known yet"
        )


async def _bad_news(view: View, check: Check, value: float | None, last: Sequence[Ended], webhook: str | None) -> None:
    """Say what has gone wrong, and exit."""
    failed = [one.rollout_id for one in last if one.failed][-1:]
    now = view.now if view.is_journal else time.time()
    news = {
        "holds": check.text, "figure": check.figure, "value": value, "bound": check.bound,
        "meaning": FIGURES[check.figure], "rollout_id": failed[0] if failed else None, "time": now,
    }  # fmt: skip
    if view.wants_json:
        view.give(news)
    else:
        view.screen.print(f"{check.text}: {check.figure} is {_shown(check, value)} ({FIGURES[check.figure]})")
        if failed and check.figure in ("errors", "infra"):
            view.screen.print(f"the last that failed: raystore show {failed[0]}; all: raystore errors")
    if webhook is not None:
        await asyncio.to_thread(_post, webhook, as_json(news))
    raise click.exceptions.Exit(BAD_NEWS)


def _post(url: str, news: str) -> None:
    request = urllib.request.Request(
        url, data=news.encode(), headers={"Content-Type": "application/json"}, method="POST"
    )
    try:
        urllib.request.urlopen(request, timeout=WEBHOOK_SECONDS).close()
    except (urllib.error.URLError, OSError, ValueError) as error:
        click.echo(f"error: the webhook {url} did not take the news: {error}", err=True)
