"""How much of what happened when: counts of the last hour in buckets of ten seconds, and rewards by policy version.

The core counts as it changes, so that a replay counts the same again and a restart forgets nothing. All of it is
bounded, costs a few additions for each event, and is in snapshots; it decides nothing, so it is in no digest.
Durations are kept as sketches: counts in classes that grow by a tenth each, so that a quantile is within 5 %, and two
sketches add up to that of both.
Not here: what only the process of the store knows (`service.sampling`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from raystore.core.records import declare, packed, unpacked
from raystore.core.schema import Calls

BUCKET_SECONDS = 10.0
BUCKETS = 360  #: that are kept: an hour, if something happened in each
VERSIONS = 1_000  #: policy versions of which the rewards are kept, the newest
REASONS = 20  #: different finish reasons of a bucket; others count as "other"

_GROWTH = math.log(1.1)


@dataclass(slots=True, eq=False)
class Sketch:
    """How numbers are distributed; of those that are not above 0 only how many there are."""

    counts: dict[int, int] = declare(make=dict, pack=lambda counts: list(counts.items()), unpack=dict)
    count: int = declare(0)
    total: float = declare(0.0)
    most: float = declare(0.0)

    def add(self, value: float) -> None:
        """One number more."""
        self.count += 1
        if value > 0.0:
            place = math.ceil(math.log(value) / _GROWTH)
            self.counts[place] = self.counts.get(place, 0) + 1
            self.total += value
            if value > self.most:
                self.most = value

    def merge(self, other: Sketch) -> None:
        """The numbers of another sketch too."""
        for place, count in other.counts.items():
            self.counts[place] = self.counts.get(place, 0) + count
        self.count += other.count
        self.total += other.total
        self.most = max(self.most, other.most)

    def quantiles(self, *shares: float) -> list[float | None]:
        """The numbers below which these shares of all are, within 5 %; None if there are none. The shares ascend."""
        if not self.count:
            return [None] * len(shares)
        found: list[float | None] = []
        places, seen, at = sorted(self.counts), self.count - sum(self.counts.values()), 0
        value = 0.0
        for share in shares:
            while seen < share * self.count and at < len(places):
                seen += self.counts[places[at]]
                value = min(math.exp((places[at] - 0.5) * _GROWTH), self.most)
                at += 1
            found.append(value)
        return found

    def summary(self) -> dict[str, float | None]:
        """Count, mean, some quantiles and the largest of them."""
        p50, p90, p99 = self.quantiles(0.5, 0.9, 0.99)
        mean, most = (self.total / self.count, self.most) if self.count else (None, None)
        return {"count": self.count, "mean": mean, "p50": p50, "p90": p90, "p99": p99, "max": most}


@dataclass(slots=True, eq=False)
class Moments:
    """Rewards: how many, and their sum, sum of squares, smallest and largest."""

    count: int = declare(0)
    total: float = declare(0.0)
    squares: float = declare(0.0)
    least: float | None = declare(None)
    most: float | None = declare(None)

    def add(self, value: float) -> None:
        """One reward more."""
        self.count += 1
        self.total += value
        self.squares += value * value
        if self.least is None or value < self.least:
            self.least = value
        if self.most is None or value > self.most:
            self.most = value

    def summary(self) -> dict[str, float | None]:
        """Count, mean, standard deviation, smallest and largest."""
        if not self.count:
            return {"count": 0, "mean": None, "std": None, "min": None, "max": None}
        mean = self.total / self.count
        std = math.sqrt(max(self.squares / self.count - mean * mean, 0.0))
        return {"count": self.count, "mean": mean, "std": std, "min": self.least, "max": self.most}


_AS_SKETCH: dict[str, Any] = {"make": Sketch, "pack": packed, "unpack": lambda row: unpacked(Sketch, row)}


@dataclass(slots=True, eq=False)
class Bucket:
    """What happened in ten seconds."""

    number: int = declare()  #: since the epoch, in steps of `BUCKET_SECONDS`
    enqueued: int = declare(0)
    started: int = declare(0)
    finished: dict[str, int] = declare(make=dict)  #: rollouts, by the outcome of their last attempt, or their status
    ended: dict[tuple[str, str], int] = declare(  #: the same rollouts, by status and mode
        make=dict, pack=lambda ended: list(ended.items()), unpack=lambda rows: {(a, b): n for (a, b), n in rows}
    )
    retried: dict[str, int] = declare(make=dict)  #: attempts after which their rollout waits again, by outcome
    spans: int = declare(0)
    span_bytes: int = declare(0)
    turns: int = declare(0)  #: calls of models, as runners report them
    prompt_tokens: int = declare(0)
    response_tokens: int = declare(0)
    finish_reasons: dict[str, int] = declare(make=dict)  #: of these calls
    durations: Sketch = declare(**_AS_SKETCH)  #: of attempts with which a rollout finished, in seconds
    waits: Sketch = declare(**_AS_SKETCH)  #: from the enqueueing of a rollout to its first attempt, in seconds
    rewards: dict[str, Moments] = declare(  #: of finished rollouts, by mode
        make=dict,
        pack=lambda rewards: {mode: packed(moments) for mode, moments in rewards.items()},
        unpack=lambda rows: {mode: unpacked(Moments, row) for mode, row in rows.items()},
    )

    waited: list[float] = declare(make=list, in_snapshot=False)  #: waits that `settle` adds to `waits`

    def settle(self) -> None:
        """Add what was only noted: a claim is too short a way for a logarithm."""
        for seconds in self.waited:
            self.waits.add(seconds)
        self.waited.clear()

    def describe(self) -> dict[str, Any]:
        """It as plain values."""
        return {
            "time": self.number * BUCKET_SECONDS,
            "enqueued": self.enqueued,
            "started": self.started,
            "finished": dict(self.finished),
            "retried": dict(self.retried),
            "spans": self.spans,
            "span_bytes": self.span_bytes,
            "turns": self.turns,
            "prompt_tokens": self.prompt_tokens,
            "response_tokens": self.response_tokens,
            "finish_reasons": dict(self.finish_reasons),
            "durations": self.durations.summary(),
            "waits": self.waits.summary(),
            "rewards": {mode: moments.summary() for mode, moments in self.rewards.items()},
        }


#: Resources id, policy version (else version of the resources), mode. Empty, None: there is none.
Version = tuple[str, int | None, str]


class Meters:
    """The counts of one store."""

    def __init__(self) -> None:
        self._buckets: deque[Bucket] = deque(maxlen=BUCKETS)
        self.now: Bucket = Bucket(0)  #: that of the newest event; `at` gives that of an instant
        self.ends: float = 0.0  #: when it ends
        self.versions: dict[Version, Moments] = {}  #: rewards of finished rollouts, the newest version last

    def at(self, now: float) -> Bucket:
        """The bucket of an instant, which is not before those of earlier ones."""
        if now >= self.ends:
            self.now.settle()
            number = int(now / BUCKET_SECONDS)
            self.now, self.ends = Bucket(number), (number + 1) * BUCKET_SECONDS
            self._buckets.append(self.now)
        return self.now

    def finished(
        self,
        now: float,
        status: str,
        outcome: str,
        mode: str | None,
        version: tuple[str | None, int | None],
        seconds: float | None,
        reward: float | None,
    ) -> None:
        """A rollout has finished, with an attempt that ran for so long with this version of its resources."""
        bucket = self.at(now)
        bucket.finished[outcome] = bucket.finished.get(outcome, 0) + 1
        kind = (status, mode or "")
        bucket.ended[kind] = bucket.ended.get(kind, 0) + 1
        if seconds is not None:
            bucket.durations.add(seconds)
        if reward is not None and math.isfinite(reward):
            bucket.rewards.setdefault(mode or "", Moments()).add(reward)
            key = (version[0] or "", version[1], mode or "")
            moments = self.versions.get(key)
            if moments is None:
                moments = self.versions[key] = Moments()
                if len(self.versions) > VERSIONS:
                    del self.versions[next(iter(self.versions))]
            moments.add(reward)

    def called(self, now: float, calls: Calls) -> None:
        """An attempt has ended that called models."""
        bucket = self.at(now)
        bucket.turns += calls["turns"]
        bucket.prompt_tokens += calls["prompt_tokens"]
        bucket.response_tokens += calls["response_tokens"]
        for reason, count in calls["finish_reasons"].items():
            known = reason if reason in bucket.finish_reasons or len(bucket.finish_reasons) < REASONS else "other"
            bucket.finish_reasons[known] = bucket.finish_reasons.get(known, 0) + count

    def since(self, time: float) -> list[Bucket]:
        """The buckets that end after an instant, the oldest first; those in which nothing happened are left out."""
        self.now.settle()
        first = int(time / BUCKET_SECONDS)
        return [bucket for bucket in self._buckets if bucket.number >= first]

    # -- snapshots ---------------------------------------------------------------------------------------------------

    def image(self) -> list[Any]:
        """All of it as plain values."""
        self.now.settle()
        versions = [[*key, packed(moments)] for key, moments in self.versions.items()]
        return [[packed(bucket) for bucket in self._buckets], versions]

    def restore(self, image: list[Any]) -> None:
        """Fill empty meters."""
        buckets, versions = image
        self._buckets.extend(unpacked(Bucket, row) for row in buckets)
        if self._buckets:
            self.now = self._buckets[-1]
            self.ends = (self.now.number + 1) * BUCKET_SECONDS
        for resources_id, version, mode, row in versions:
            self.versions[resources_id, version, mode] = unpacked(Moments, row)


def totals(buckets: Iterable[Bucket]) -> dict[str, Any]:
    """What some buckets come to together, as `Bucket.describe` says it of one; without rewards."""
    whole = Bucket(0)
    for bucket in buckets:
        for name in ("enqueued", "started", "spans", "span_bytes", "turns", "prompt_tokens", "response_tokens"):
            setattr(whole, name, getattr(whole, name) + getattr(bucket, name))
        for name in ("finished", "retried", "finish_reasons"):
            counts: dict[str, int] = getattr(whole, name)
            for key, count in getattr(bucket, name).items():
                counts[key] = counts.get(key, 0) + count
        whole.durations.merge(bucket.durations)
        whole.waits.merge(bucket.waits)
    described = whole.describe()
    del described["time"], described["rewards"]
    return described
