"""`raystore limits`: who limited whom, as shares of the last hour."""

from __future__ import annotations

from typing import Any

import click

from raystore.cli.drawing import Column, bar
from raystore.cli.reading import Seconds, View, reading
from raystore.cli.text import clean, counted, duration, figure, share
from raystore.service.sampling import CAUSES

#: What to do about a cause that took most of the time; of the others nothing is to be done.
REMEDIES = {
    "trainer_waited": "rollouts are the bottleneck: more runners or places, or agents that are faster (raystore slow)",
    "admission_closed": "the trainer is the bottleneck: make its step faster, or give the feed a larger max_lag",
    "runners_idle": "runners have nothing to do: enqueue sooner, raise max_lag, or use fewer of them",
    "runners_busy": "all places of the runners are taken: more runners or a higher concurrency would be used",
    "paused": "raystore why says who has paused what; store.resume() or feed.resume() goes on",
    "memory_full": "a consumer holds what could be evicted: let it go on, or keep spans in a journal",
    "journal": "the disk of the journal is slow: another disk, or durability='process'",
    "store": "the process of the store is busy: larger calls, fewer small ones; or a core of its own",
}
WIDE = 30  #: cells of the bar


def findings(metrics: Any) -> list[str]:
    """Sentences on what took more than a fifth of the time, the largest share first."""
    ranked = sorted(metrics["shares"].items(), key=lambda pair: -pair[1])
    return [f"{share_:.0%}: {REMEDIES[cause]}" for cause, share_ in ranked if share_ > 0.2 and cause in REMEDIES]


@reading("raystore limits --last 10m")
@click.option("--last", type=Seconds(), default=3600.0, show_default="1h", help="Of so long, an hour at most.")
async def limits(view: View, *, last: float) -> None:
    """Who limited whom: the share of the time in which each cause held the run back; several may at once.

    The store looks once a second, while somebody waits or something runs. A journal knows only what happened, and not
    what was waited for.
    """
    metrics: Any = await view.store.metrics(seconds=min(last, 3600.0), versions=0)
    if view.wants_json:
        view.give({name: metrics[name] for name in ("sampled_seconds", "shares", "waited_seconds", "loop_lag_seconds")})
        return
    screen, looked = view.screen, metrics["sampled_seconds"]
    if not looked:
        screen.print("nothing was waited for in this time" if not view.is_journal else "a journal does not know this")
        return
    screen.heading("who limited whom", f"in {duration(looked)} in which something went on")
    rows = [
        [cause, f"{part:.0%}", bar(0.0, part, WIDE) if part else "", CAUSES[cause]]
        for cause, part in sorted(metrics["shares"].items(), key=lambda pair: -pair[1])
    ]
    screen.table([Column("cause"), Column("share", right=True), Column("", 2), Column("when", 1, least=20)], rows)
    if metrics["waited_seconds"]:
        screen.heading("waited for batches")
        screen.facts(
            (clean(name), f"{duration(seconds)} ({share(seconds, looked)})")
            for name, seconds in metrics["waited_seconds"].items()
        )
    total = metrics["total"]
    waits, durations = total["waits"], total["durations"]
    screen.heading("meanwhile")
    screen.facts(
        [
            ("finished", counted(sum(total["finished"].values()), "rollout")),
            ("in the queue", _spread(waits)),
            ("took", _spread(durations)),
            ("tokens a turn", figure(total["response_tokens"] / total["turns"]) if total["turns"] else ""),
            ("loop late by", f"{duration(metrics['loop_lag_seconds'])} at most"),
        ]
    )
    screen.print("", *findings(metrics))


def _spread(found: Any) -> str:
    if not found["count"]:
        return ""
    half, most, all_of_them = (duration(found[name]) for name in ("p50", "p90", "max"))
    return f"half within {half}, 90 % within {most}, all within {all_of_them}"
