"""The options that every store takes, from what a user writes to a `StoreConfig`.

Not here: what they mean (`config` and the README), options of one kind of store only.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from raystore.config import DEFAULT_JOURNAL_OBJECT_BYTES, StoreConfig
from raystore.core.wanted import USUAL, make_filter
from raystore.errors import AgentNotPicklableError, InvalidValueError
from raystore.errors.words import either, meant
from raystore.types import RolloutConfig, Span
from raystore.values import pickler
from raystore.values.plain import plain, scalar
from raystore.wire.checks import filter_arguments, identifier, rollout_config
from raystore.wire.convert import Encoder

FILTERS = ("mode", "tags", "queue", "group_id", "status_in")
RESUME = ("auto", "must", "never")


def make_config(
    *,
    eviction_memory_threshold: float | int | None,
    safe_memory_threshold: float | int | None,
    span_size_estimator: Callable[[Span], int] | None,
    default_config: RolloutConfig | None,
    duplicate_spans: str,
    on_memory_full: str,
    max_deliveries: int,
    suspect_patience_seconds: float,
    max_queued: int | None,
    retention: float | int | dict[str, Any] | None,
    keep_resources: int | None,
    limits: dict[str, int] | None,
    consumers: Sequence[str] | Mapping[str, Mapping[str, Any] | None] | None,
    clock: str,
    journal: str | os.PathLike[str] | None,
    durability: str,
    resume: str,
    journal_object_bytes: int = DEFAULT_JOURNAL_OBJECT_BYTES,
) -> StoreConfig:
    """A checked configuration; raises for a value that is not valid."""
    if resume not in RESUME:
        raise InvalidValueError("resume", resume, either([repr(one) for one in RESUME]) + meant(resume, RESUME))
    if journal is None and resume == "must":
        raise InvalidValueError("resume", resume, "a journal= to resume from")
    chosen = RolloutConfig() if default_config is None else default_config
    *seconds_and_attempts, retried = rollout_config("default_config", chosen)
    config = StoreConfig(
        eviction_memory_threshold=scalar(eviction_memory_threshold),
        safe_memory_threshold=scalar(safe_memory_threshold),
        span_size_estimator=None if span_size_estimator is None else _pickled(span_size_estimator),
        default_config=(*seconds_and_attempts, tuple(retried)),
        duplicate_spans=duplicate_spans,
        on_memory_full=on_memory_full,
        max_deliveries=scalar(max_deliveries),
        suspect_patience_seconds=scalar(suspect_patience_seconds),
        max_queued=scalar(max_queued),
        retention=plain("retention", retention),
        keep_resources=scalar(keep_resources),
        limits=plain("limits", dict(limits or {})),
        consumers=_consumers(consumers),
        clock=clock,
        journal=None if journal is None else directory("journal", journal),
        durability=durability,
        journal_object_bytes=journal_object_bytes,
    )
    config.check()
    return config


def directory(name: str, path: Any) -> str:
    """The path of a directory, absolute."""
    given = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(given, str) or not given or "\0" in given:
        raise InvalidValueError(name, path, "the path of a directory")
    return os.path.abspath(os.path.expanduser(given))


def _consumers(given: Any) -> dict[str, dict[str, Any] | None]:
    """The consumers that are known from the start, each with its filter."""
    expected = f"names of consumers, or a mapping of each name to a filter ({', '.join(FILTERS)})"
    if given is None:
        return {}
    if isinstance(given, str) or not isinstance(given, (Sequence, Mapping, Set)):
        raise InvalidValueError("consumers", given, expected)
    chosen = dict(given) if isinstance(given, Mapping) else dict.fromkeys(given)
    made: dict[str, dict[str, Any] | None] = {}
    for name, filters in chosen.items():
        identifier("consumers", name)
        if filters is None:
            made[name] = None
            continue
        if not isinstance(filters, Mapping) or set(filters) - set(FILTERS):
            raise InvalidValueError(f"consumers[{name!r}]", filters, f"None, or a mapping of {', '.join(FILTERS)}")
        checked = filter_arguments(**filters)
        made[name] = make_filter(**checked) or {"status_in": list(USUAL)}
    return made


def _pickled(estimator: Callable[[Span], int]) -> bytes:
    if not callable(estimator):
        raise InvalidValueError("span_size_estimator", estimator, "a function from a Span to bytes")
    try:
        return pickler.dumps(estimator)
    except Exception as error:
        raise AgentNotPicklableError(f"span_size_estimator {estimator!r}", str(error)) from error


def make_encoder(limits: dict[str, int], estimator: bytes | None) -> Encoder:
    """The encoder of a store's clients."""
    function = None
    if estimator is not None:
        function = pickle.loads(estimator)
    return Encoder(limits, function)
