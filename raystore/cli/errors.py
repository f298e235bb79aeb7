"""`raystore errors`: what failed, by whose doing, and where.

What the infrastructure did (a process that died, an abort) says nothing of the policy; what an agent did is the
policy's own. Each is grouped by what was raised and where, whatever the values in its text, by runner and host, and by
environment, with one rollout of each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import click

from raystore.cli.drawing import Column
from raystore.cli.reading import COUNT, Seconds, View, all_of, attempt_of, environment_of, reading
from raystore.cli.text import clean, counted, duration, last_line, place_of, share

#: Whose doing an outcome is.
INFRASTRUCTURE = ("infra", "runner_lost")
POLICY = ("agent_error", "timeout", "unresponsive", "dropped")

_BY_ERROR = [
    Column("count", right=True), Column("outcome", 1), Column("raised at", 3, least=20), Column("error", least=30),
    Column("one rollout", 2),
]  # fmt: skip
_BY_PLACE = [
    Column("count", right=True), Column("of", 2, True), Column("share", 1, True), Column("where", least=20),
    Column("one rollout", 3),
]  # fmt: skip


@dataclass
class Failure:
    """An attempt that did not succeed, with its rollout."""

    rollout: Any
    attempt: Any

    @property
    def error(self) -> str:
        """What was raised, in one line; without an error the outcome."""
        return clean(last_line(self.attempt.error), 300) or f"({self.attempt.outcome}, without an error)"


@dataclass
class Found:
    """All attempts that were looked at, and those that failed, by whose doing."""

    attempts: list[tuple[Any, Any]] = field(default_factory=list)  # rollout, attempt
    policy: list[Failure] = field(default_factory=list)
    infrastructure: list[Failure] = field(default_factory=list)
    stopped: dict[str, int] = field(default_factory=dict)  # by outcome: withdrawn, cancelled, superseded


async def collect(view: View, since: float | None) -> Found:
    """The attempts that ended since a time (None: all), earlier attempts of retried rollouts too."""
    found, retried = Found(), []
    async for rollout in view.rollouts():
        attempt = attempt_of(rollout)
        if attempt is None:
            continue
        if attempt.sequence_id > 1:
            retried.append(rollout)
        found.attempts.append((rollout, attempt))
    histories = await all_of([lambda one=one: view.store.query_attempts(one.rollout_id) for one in retried])  # type: ignore[misc]
    for rollout, history in zip(retried, histories, strict=True):
        found.attempts += [(rollout, one) for one in history if one.attempt_id != rollout.attempt.attempt_id]
    if since is not None:
        found.attempts = [pair for pair in found.attempts if (pair[1].end_time or view.now) >= since]
    for rollout, attempt in found.attempts:
        if attempt.outcome in INFRASTRUCTURE:
            found.infrastructure.append(Failure(rollout, attempt))
        elif attempt.outcome in POLICY:
            found.policy.append(Failure(rollout, attempt))
        elif attempt.outcome not in (None, "ok"):
            found.stopped[attempt.outcome] = found.stopped.get(attempt.outcome, 0) + 1
    return found


def grouped(failures: Iterable[Failure], key: Any) -> list[tuple[Any, list[Failure]]]:
    """Failures by a key, those with the most first."""
    groups: dict[Any, list[Failure]] = {}
    for failure in failures:
        groups.setdefault(key(failure), []).append(failure)
    return sorted(groups.items(), key=lambda item: (-len(item[1]), str(item[0])))


#: What differs between errors of one kind: quoted values, ids, numbers.
_VALUES = re.compile(r"""'[^']*'|"[^"]*"|\b[0-9a-f]{8,}\b|\d+""")


def _what(failure: Failure) -> tuple[str, str, str]:
    """Errors of one kind: of one outcome, at one place, and alike but for the values in them."""
    return failure.attempt.outcome, clean(place_of(failure.attempt.error), 120), _VALUES.sub("#", failure.error)


@reading("raystore errors --since 1h")
@click.option("--since", type=Seconds(), metavar="DURATION", help="Only attempts that ended within this time.")
@click.option("--limit", **COUNT, default=10, help="So many of each kind at most.")
async def errors(view: View, *, since: float | None, limit: int) -> None:
    """What failed: the policy's doing and the infrastructure's apart; by error, runner, host and environment."""
    found = await collect(view, None if since is None else view.now - since)
    hosts = await _hosts(view)

    def host(attempt: Any) -> str | None:
        return hosts.get(attempt.worker_id)

    if view.wants_json:
        view.give(
            {
                "attempts": len(found.attempts),
                "stopped": found.stopped,
                "policy": _as_plain(found, found.policy, host),
                "infrastructure": _as_plain(found, found.infrastructure, host),
            }
        )
        return
    ended = sum(attempt.outcome is not None for _, attempt in found.attempts)
    within = f" within {duration(since)}" if since is not None else ""
    view.screen.print(f"{counted(ended, 'attempt')} ended{within}")
    _section(view, "the policy's doing", found.policy, found, host, limit)
    _section(view, "the infrastructure's doing", found.infrastructure, found, host, limit)
    if found.stopped:
        said = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(found.stopped.items()))
        view.screen.print("", f"stopped, and no failures: {said}")


async def _hosts(view: View) -> dict[str, str]:
    """The host of each runner that has told it with its heartbeats."""
    found = {}
    for worker in await view.store.query_workers():
        stats = worker.heartbeat_stats
        if isinstance(stats, dict) and isinstance(stats.get("host"), str):
            found[worker.worker_id] = stats["host"]
    return found


_PLACES: list[tuple[str, Any]] = [
    ("by environment", lambda rollout, attempt, host: environment_of(rollout)),
    ("by runner", lambda rollout, attempt, host: attempt.worker_id or "a runner without a name"),
    ("by host", lambda rollout, attempt, host: host(attempt)),
]


def _shares(found: Found, failures: Sequence[Failure], of: Any, host: Any) -> list[tuple[str, int, int, str]]:
    """Of each place: failures there, attempts that ended there, the id of one that failed; the worst share first."""
    totals: dict[Any, int] = {}
    for rollout, attempt in found.attempts:
        if attempt.outcome is not None:
            place = of(rollout, attempt, host)
            totals[place] = totals.get(place, 0) + 1
    groups = grouped(failures, lambda failure: of(failure.rollout, failure.attempt, host))
    rows = [
        (place, len(held), totals[place], held[0].rollout.rollout_id) for place, held in groups if place is not None
    ]
    return sorted(rows, key=lambda row: (-row[1] / row[2], -row[1]))


def _section(view: View, title: str, failures: list[Failure], found: Found, host: Any, limit: int) -> None:
    ended = sum(attempt.outcome is not None for _, attempt in found.attempts)
    view.screen.heading(title, f"{counted(len(failures), 'attempt')}, {share(len(failures), ended) or 'none'}")
    if not failures:
        return
    kinds = grouped(failures, _what)
    view.screen.table(
        _BY_ERROR,
        [
            [len(held), outcome, place, held[0].error, held[0].rollout.rollout_id]
            for (outcome, place, _), held in kinds[:limit]
        ],
    )
    if len(kinds) > limit:
        view.screen.print(f"… and {len(kinds) - limit} more kinds; --limit shows them")
    for name, of in _PLACES:
        rows = _shares(found, failures, of, host)
        if len(rows) > 1 or (rows and name == "by environment"):
            view.screen.print("", name)
            view.screen.table(
                _BY_PLACE, [[n, total, share(n, total), where, one] for where, n, total, one in rows[:limit]]
            )


def _as_plain(found: Found, failures: list[Failure], host: Any) -> dict[str, Any]:
    """The groups of failures as plain data."""
    told: dict[str, Any] = {
        "count": len(failures),
        "by_error": [
            {"outcome": outcome, "raised_at": place, "error": held[0].error, "count": len(held),
             "rollout_id": held[0].rollout.rollout_id}
            for (outcome, place, _), held in grouped(failures, _what)
        ],
    }  # fmt: skip
    for name, of in _PLACES:
        told[name.replace(" ", "_")] = [
            {"where": where, "count": count, "attempts": total, "rollout_id": one}
            for where, count, total, one in _shares(found, failures, of, host)
        ]
    return told
