"""The figures of a store for Prometheus, through `ray.util.metrics`: Ray's agent on the node of the store exports them.

`FIGURES` has all of them: name, kind, labels, meaning, and how each is read. Ray puts `ray_` before each name. What
agent-lightning counts too has its name and its labels. An error in here is logged and never reaches the store.
Not here: the figures themselves (`core.meters`, `service.sampling`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

from ray.util.metrics import Counter, Gauge

from raystore.core.meters import Bucket
from raystore.reports.log import a_minute, logger_of
from raystore.service.service import Service

logger: logging.Logger = logger_of("raystore.store")

EXPORT_SECONDS = 5.0  #: between two exports
LAST_SECONDS = 60.0  #: that rates, quantiles and shares are of

Labels = tuple[str, ...]
Values = Iterable[tuple[Labels, float]]


class Source(NamedTuple):
    """What figures are read from."""

    statistics: dict[str, Any]
    metrics: dict[str, Any]
    came: dict[Labels, float]  #: what was counted since the last time, by name and labels


class Figure(NamedTuple):
    """One metric."""

    name: str
    kind: Literal["gauge", "counter"]  #: a counter is read as what came since the last time
    labels: Labels
    meaning: str
    read: Callable[[Source], Values]


def _by_label(*path: str) -> Callable[[Source], Values]:
    """A mapping of the statistics, by its key."""

    def read(source: Source) -> Values:
        return [((str(key),), float(value)) for key, value in source.statistics[path[0]].items()]

    return read


def _statistic(name: str) -> Callable[[Source], Values]:
    return lambda source: [((), float(source.statistics[name] or 0))]


def _metric(name: str) -> Callable[[Source], Values]:
    return lambda source: [((), float(source.metrics[name] or 0))]


def _metrics_by_label(name: str) -> Callable[[Source], Values]:
    return lambda source: [((key,), float(value)) for key, value in source.metrics[name].items()]


def _quantiles(name: str) -> Callable[[Source], Values]:
    def read(source: Source) -> Values:
        found = source.metrics["total"][name]
        return [((str(share / 100),), found[f"p{share}"]) for share in (50, 90, 99) if found[f"p{share}"] is not None]

    return read


def _rewards(source: Source) -> Values:
    sums: dict[str, tuple[int, float]] = {}
    for bucket in source.metrics["buckets"]:
        for mode, rewards in bucket["rewards"].items():
            count, total = sums.get(mode, (0, 0.0))
            sums[mode] = (count + rewards["count"], total + rewards["count"] * rewards["mean"])
    return [((mode,), total / count) for mode, (count, total) in sums.items()]


def counted(bucket: Bucket) -> dict[Labels, float]:
    """All that a bucket counts, by name and labels."""
    plain = ("enqueued", "started", "spans", "span_bytes", "turns", "prompt_tokens", "response_tokens")
    found: dict[Labels, float] = {(name,): getattr(bucket, name) for name in plain}
    found |= {("finished", outcome): count for outcome, count in bucket.finished.items()}
    found |= {("retried", outcome): count for outcome, count in bucket.retried.items()}
    found |= {("ended", *kind): count for kind, count in bucket.ended.items()}
    return found


def _came(name: str) -> Callable[[Source], Values]:
    """What of something was counted since the last time."""

    return lambda source: [(key[1:], count) for key, count in source.came.items() if key[0] == name]


def _tokens(source: Source) -> Values:
    return [((kind,), count) for kind in ("prompt", "response") for _, count in _came(f"{kind}_tokens")(source)]


FIGURES: tuple[Figure, ...] = (
    Figure(
        "agl_rollouts_total", "counter", ("status", "mode"), "rollouts that finished, as agent-lightning counts them",
        _came("ended"),
    ),
    Figure(
        "raystore_rollouts_finished_total", "counter", ("outcome",), "rollouts that finished, by the outcome of their "
        "last attempt", _came("finished"),
    ),
    Figure("raystore_rollouts_enqueued_total", "counter", (), "rollouts that were made", _came("enqueued")),
    Figure("raystore_attempts_started_total", "counter", (), "attempts that began", _came("started")),
    Figure(
        "raystore_attempts_retried_total", "counter", ("outcome",), "attempts after which their rollout waits again",
        _came("retried"),
    ),
    Figure("raystore_spans_total", "counter", (), "spans that were stored", _came("spans")),
    Figure("raystore_span_bytes_total", "counter", (), "their bytes, as they count in memory", _came("span_bytes")),
    Figure("raystore_turns_total", "counter", (), "calls of models, as runners count them", _came("turns")),
    Figure("raystore_tokens_total", "counter", ("kind",), "tokens of these calls: prompt and response", _tokens),
    Figure("raystore_rollouts", "gauge", ("status",), "rollouts by status", _by_label("rollouts_by_status")),
    Figure("raystore_groups", "gauge", ("status",), "groups by status", _by_label("groups_by_status")),
    Figure("raystore_queue_length", "gauge", ("queue",), "rollouts that wait", _by_label("queue_lengths")),
    Figure(
        "raystore_rollout_seconds", "gauge", ("quantile",), "duration of the last attempts of the rollouts that "
        "finished in the last minute", _quantiles("durations"),
    ),
    Figure(
        "raystore_queue_seconds", "gauge", ("quantile",), "time between enqueueing and first attempt, of the last "
        "minute", _quantiles("waits"),
    ),
    Figure("raystore_reward", "gauge", ("mode",), "mean reward of the rollouts of the last minute", _rewards),
    Figure(
        "raystore_limited_ratio", "gauge", ("cause",), "share of the last minute in which this held the run back",
        _metrics_by_label("shares"),
    ),
    Figure(
        "raystore_consumer_waited_seconds", "gauge", ("consumer",), "time that a consumer waited for a batch in the "
        "last minute", _metrics_by_label("waited_seconds"),
    ),
    Figure("raystore_memory_bytes", "gauge", ("kind",), "memory by kind; thresholds", _metrics_by_label("memory")),
    Figure("raystore_evicted_spans", "gauge", (), "spans that were evicted so far", _statistic("evicted_spans")),
    Figure(
        "raystore_journal_lag_seconds", "gauge", (), "for how long the oldest change has waited for the disk",
        _metric("journal_lag_seconds"),
    ),
    Figure(
        "raystore_loop_lag_seconds", "gauge", (), "by how much the loop of the store was late, at most, in the last "
        "minute", _metric("loop_lag_seconds"),
    ),
    Figure("raystore_operations", "gauge", (), "operations since the store's process began", _metric("operations")),
    Figure("raystore_actor_calls", "gauge", (), "actor calls that carried them", _metric("actor_calls")),
    Figure("raystore_waiters", "gauge", (), "calls that wait in the store", _statistic("waiters")),
    Figure("raystore_sessions", "gauge", (), "processes that are connected", _statistic("sessions")),
    Figure("raystore_cpu_seconds", "gauge", (), "CPU time of the store's process", _statistic("cpu_seconds")),
    Figure("raystore_rss_bytes", "gauge", (), "resident memory of the store's process", _statistic("rss_bytes")),
)  # fmt: skip


class Exporter:
    """Exports the figures of one store, every few seconds, on a thread of its own."""

    def __init__(self, service: Service, name: str) -> None:
        self._service = service
        self._thread = ThreadPoolExecutor(1, "raystore-exporter")
        #: By number of a bucket: what was exported, by an earlier process what is there already.
        self._counted = {bucket.number: counted(bucket) for bucket in service.state.meters.since(0.0)}
        self._shown: dict[str, set[Labels]] = {}  # labels that each gauge has
        self._store = {"store": name}
        self._metrics: dict[str, Any] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Export from now on, from the loop that runs."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                source = self.read()
                await loop.run_in_executor(self._thread, self.export, source)
            except Exception:  # whatever Ray raises: figures never stop a store
                logger.warning("Metrics cannot be exported", exc_info=True, extra=a_minute("metrics not exported"))
            await asyncio.sleep(EXPORT_SECONDS)

    def read(self) -> Source:
        """The figures as they are now."""
        statistics, metrics, buckets = self._service.figures(LAST_SECONDS)
        now = {bucket.number: counted(bucket) for bucket in buckets}
        came: dict[Labels, float] = {}
        for number, counts in now.items():
            before = self._counted.get(number, {})
            for key, count in counts.items():
                if (more := count - before.get(key, 0.0)) > 0:
                    came[key] = came.get(key, 0.0) + more
        self._counted = now
        return Source(statistics, metrics, came)

    def export(self, source: Source) -> None:
        """Let Ray know of them."""
        for figure in FIGURES:
            metric = self._metrics.get(figure.name)
            if metric is None:
                kind = Counter if figure.kind == "counter" else Gauge
                metric = self._metrics[figure.name] = kind(
                    figure.name, description=figure.meaning, tag_keys=("store", *figure.labels)
                )
            found = dict(figure.read(source))
            if figure.kind == "counter":
                for labels, count in found.items():
                    metric.inc(count, tags=self._tags(figure, labels))
                continue
            kept = set(found)
            for labels in self._shown.get(figure.name, set()) - kept:
                found[labels] = 0.0  # it is gone
            for labels, value in found.items():
                metric.set(value, tags=self._tags(figure, labels))
            self._shown[figure.name] = kept

    def _tags(self, figure: Figure, labels: Labels) -> dict[str, str]:
        return self._store | dict(zip(figure.labels, labels, strict=True))
