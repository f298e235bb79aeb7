"""The options of a store: checked, and resolved against the machine once, when the store starts.

Ratios refer to the memory capacity of the node the store runs on, capped by the cgroup limit and, in an actor, less
Ray's object store. `StoreConfig` is what a user chose; `resolve` makes of it the plain numbers the core works with.
Not here: eviction itself (`core.eviction`).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raystore.core.records import Config
from raystore.core.state import Settings
from raystore.errors import InvalidValueError
from raystore.errors.words import either, meant

logger: logging.Logger = logging.getLogger(__name__)

MIB = 1024 * 1024
DEFAULT_EVICTION_RATIO = 0.7  #: of the capacity
DEFAULT_SAFE_RATIO = 0.8  #: of the eviction threshold
FALLBACK_CAPACITY_BYTES = 8 * 1024 * MIB

#: Bytes; beyond these, pass a reference. Real traces reach 100-400 MB for a rollout, in many spans.
DEFAULT_LIMITS = {"value_bytes": 16 * MIB, "span_bytes": 64 * MIB, "call_bytes": 64 * MIB}

DEFAULT_JOURNAL_OBJECT_BYTES = 64 * MIB  #: of the largest object of resources that a journal keeps


@dataclass(slots=True)
class StoreConfig:
    """What a user chose; plain data, so that it travels to an actor and can be compared."""

    eviction_memory_threshold: float | int | None = None
    safe_memory_threshold: float | int | None = None
    span_size_estimator: bytes | None = None  # pickled: every client uses the same one, the actor never opens it
    default_config: tuple[Any, ...] = (None, None, 1, ())
    duplicate_spans: str = "reject"
    on_memory_full: str = "evict"
    max_deliveries: int = 3
    suspect_patience_seconds: float = 10.0
    max_queued: int | None = None
    retention: float | int | dict[str, Any] | None = None
    keep_resources: int | None = None
    limits: dict[str, int] = field(default_factory=dict)
    clock: str = "system"
    consumers: dict[str, dict[str, Any] | None] = field(default_factory=dict)  # filter by name; None: not fixed yet
    journal: str | None = None
    durability: str = "power"
    journal_object_bytes: int = DEFAULT_JOURNAL_OBJECT_BYTES

    def check(self) -> None:
        """Raise for a value that no machine could make valid."""
        _one_of("duplicate_spans", self.duplicate_spans, ("reject", "keep"))
        _one_of("on_memory_full", self.on_memory_full, ("evict", "pause"))
        _one_of("clock", self.clock, ("system", "manual"))
        _one_of("durability", self.durability, ("power", "process", "none"))
        _count("max_deliveries", self.max_deliveries, at_least=1)
        patience = self.suspect_patience_seconds
        if isinstance(patience, bool) or not isinstance(patience, (int, float)) or not 0 <= patience < math.inf:
            raise InvalidValueError("suspect_patience_seconds", patience, "a number of seconds, 0 or more")
        for name in ("max_queued", "keep_resources"):
            if getattr(self, name) is not None:
                _count(name, getattr(self, name), at_least=1)
        _count("journal_object_bytes", self.journal_object_bytes, at_least=0)
        for name, limit in self.limits.items():
            _one_of("limits", name, tuple(DEFAULT_LIMITS))
            _count(f"limits[{name!r}]", limit, at_least=1)
        self.retention_rule()
        resolve_thresholds(self, memory_capacity())

    def retention_rule(self) -> tuple[float | None, int | None]:
        """Age in seconds and number of finished rollouts kept.

        A number alone is an age in seconds; a dict says `max_age_seconds`, `max_rollouts`, or both.
        """
        rule = self.retention
        expected = "seconds, or a dict with max_age_seconds and/or max_rollouts"
        if rule is None:
            return None, None
        if isinstance(rule, dict):
            if not rule or rule.keys() - {"max_age_seconds", "max_rollouts"}:
                raise InvalidValueError("retention", rule, expected)
            age, count = rule.get("max_age_seconds"), rule.get("max_rollouts")
        else:
            age, count = rule, None
        if age is not None and (isinstance(age, bool) or not isinstance(age, (int, float)) or not age >= 0):
            raise InvalidValueError("retention", rule, expected)
        if count is not None:
            _count("retention", count, at_least=0)
        return age, count

    def all_limits(self) -> dict[str, int]:
        """The limits with their defaults."""
        return DEFAULT_LIMITS | self.limits

    def differences(self, other: StoreConfig) -> list[str]:
        """What another configuration has otherwise, for people to read."""
        found = []
        for name in self.__slots__:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                shown = "a function" if name == "span_size_estimator" else f"{theirs!r} there, {ours!r} asked for"
                found.append(f"{name}: {shown}")
        return found


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidValueError(name, value, either([repr(one) for one in allowed]) + meant(value, allowed))


def _count(name: str, value: Any, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise InvalidValueError(name, value, f"a whole number, {at_least} or more")


def resolve_thresholds(config: StoreConfig, capacity_bytes: int) -> tuple[int, int]:
    """Eviction and safe threshold in bytes; a float is a ratio of the capacity, an int is bytes."""
    if capacity_bytes <= 0:
        raise ValueError(f"Detected memory capacity must be positive, got {capacity_bytes}")
    eviction = config.eviction_memory_threshold
    safe = config.safe_memory_threshold
    if eviction is None:
        eviction_bytes = int(DEFAULT_EVICTION_RATIO * capacity_bytes)
    elif isinstance(eviction, float):
        if not 0 < eviction <= 1:
            raise ValueError(f"eviction_memory_threshold ratio must be greater than 0 and at most 1, got {eviction}")
        eviction_bytes = int(eviction * capacity_bytes)
    else:
        eviction_bytes = _bytes("eviction_memory_threshold", eviction)
    if eviction_bytes < 1:
        raise ValueError(f"eviction_memory_threshold must be at least 1 bytes, got {eviction_bytes}")
    if safe is None:
        safe_bytes = max(int(DEFAULT_SAFE_RATIO * eviction_bytes), 0)
    elif isinstance(safe, float):
        if not 0 <= safe <= 1:
            raise ValueError(f"safe_memory_threshold ratio must be between 0 and 1 inclusive, got {safe}")
        safe_bytes = int(safe * capacity_bytes)
    else:
        safe_bytes = _bytes("safe_memory_threshold", safe)
    if safe_bytes >= eviction_bytes:
        raise ValueError(
            "safe_memory_threshold must be smaller than eviction_memory_threshold, "
            f"got {safe_bytes} and {eviction_bytes} bytes"
        )
    return eviction_bytes, safe_bytes


def _bytes(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r} must be a ratio (float), a number of bytes (int), or None")
    if value < 0:
        raise ValueError(f"{name} must be non-negative, got {value}")
    return value


def resolve(config: StoreConfig, capacity_bytes: int) -> Settings:
    """The plain numbers the core works with."""
    eviction_bytes, safe_bytes = resolve_thresholds(config, capacity_bytes)
    retention_seconds, retention_count = config.retention_rule()
    return Settings(
        eviction_bytes=eviction_bytes,
        safe_bytes=safe_bytes,
        spans_only=config.span_size_estimator is not None,
        keep_duplicates=config.duplicate_spans == "keep",
        pause_when_full=config.on_memory_full == "pause",
        max_deliveries=config.max_deliveries,
        suspect_patience_seconds=float(config.suspect_patience_seconds),
        max_queued=config.max_queued,
        retention_seconds=retention_seconds,
        retention_count=retention_count,
        keep_resources=config.keep_resources,
        default_config=Config(*config.default_config),
        on_disk=config.journal is not None,
        consumers=dict(config.consumers),
    )


def memory_capacity(*, object_store_bytes: int = 0) -> int:
    """Bytes this process may count on: the machine's memory, capped by the cgroup, less Ray's object store."""
    try:
        import psutil

        total = int(psutil.virtual_memory().total)
    except ImportError:
        logger.error("psutil is not installed: assuming %d bytes of memory", FALLBACK_CAPACITY_BYTES)
        total = FALLBACK_CAPACITY_BYTES
    limits = [total, *(_cgroup_limit(path) for path in CGROUP_LIMIT_FILES)]
    return int(min(limits)) - object_store_bytes


#: Where the kernel says how much memory this container may use, cgroup v2 and v1.
CGROUP_LIMIT_FILES = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def _cgroup_limit(path: Path) -> float:
    try:
        text = path.read_text().strip()
    except OSError:  # no such cgroup version here, or not readable: then it limits nothing we could know of
        return math.inf
    return float(text) if text.isdigit() and int(text) > 0 else math.inf


def resident_bytes() -> int | None:
    """Memory that this process occupies; None if psutil is not installed."""
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.Process().memory_info().rss)
