"""The options of a store: what a user writes, and what becomes of it on the machine that runs the store.

`StoreOptions` describes them, `make_config` checks what a user wrote, `resolve` turns a checked configuration into the
plain numbers the core works with. Ratios refer to the memory of the node that the store runs on, capped by the cgroup
limit and, in an actor, less Ray's object store.
The actor's process imports this, so that what loads pydantic is imported by the functions that need it.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from functools import partial
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, get_args

import psutil

from raystore.core.records import Config
from raystore.core.state import Settings
from raystore.core.training import USUAL, make_filter
from raystore.errors import AgentNotPicklableError, InvalidValueError
from raystore.errors.text import either, meant
from raystore.values import pickler
from raystore.values.plain import number, plain, scalar, whole

if TYPE_CHECKING:
    from raystore.types.contract import RolloutConfig
    from raystore.types.spans import Span

MIB = 1024 * 1024
DEFAULT_EVICTION_RATIO = 0.7  #: of the capacity
DEFAULT_SAFE_RATIO = 0.8  #: of the eviction threshold

#: Bytes; beyond these, pass a reference. Real traces reach 100-400 MB for a rollout, in many spans.
DEFAULT_LIMITS = {
    "value_bytes": 16 * MIB, "span_bytes": 64 * MIB, "call_bytes": 64 * MIB, "state_bytes": 16 * MIB,
}  # fmt: skip

FILTERS = ("mode", "tags", "queue", "group_id", "status_in")

DuplicateSpans = Literal["reject", "keep"]
OnMemoryFull = Literal["evict", "pause"]
Clock = Literal["system", "manual"]
Durability = Literal["power", "process", "none"]
Resume = Literal["auto", "must", "never"]


class StoreOptions(TypedDict, total=False):
    """The options of every store, on Ray (`start`) or in process (`InMemoryLightningStore`). All may be left out.

    A value that is not valid is an `InvalidValueError` or another `ValueError`, and no store is started.

    Attributes:
        eviction_memory_threshold: memory above which whole rollouts lose their spans. A float is a ratio of the memory
            capacity, an int is bytes. Default: 0.7.
        safe_memory_threshold: memory down to which they do; a ratio or bytes likewise. Default: 0.8 of the eviction
            threshold.
        span_size_estimator: returns the bytes of a span, in the process that adds it; then only spans count as memory.
        default_config: the configuration of rollouts that are enqueued without one.
        duplicate_spans: "reject" (default) or "keep" a span whose id its attempt has already.
        on_memory_full: "evict" (default); or "pause": evict released rollouts only, and hand out no work until memory
            is below the safe threshold.
        max_deliveries: how often a rollout may be aborted, or lost with its process and be to blame, before it fails.
            To blame is a rollout that was lost alone; of several that were lost together, the one that had been lost
            most often before. A rollout with a `RetryRule` for one of the two is tried again as that says. Default: 3.
        suspect_patience_seconds: how long a rollout that was lost with its process waits for a process that runs
            nothing else; then any process gets it. A process takes no other work for one for as long at most.
            Default: 10.
        max_queued: rollouts that may wait; above it, enqueuing raises `OverloadedError`. Default: any number.
        retention: when to delete finished rollouts that were released or read: an age in seconds, or
            {"max_age_seconds": ..., "max_rollouts": ...}. Default: never.
        keep_resources: newest resources ids to keep; older ones go when nobody refers to them. Default: all stay.
        limits: largest size in bytes of one value, span or call, or of a state that an agent saves: {"value_bytes":
            ..., "span_bytes": ..., "call_bytes": ..., "state_bytes": ...}. Default: 16 MiB, 64 MiB, 64 MiB, 16 MiB.
        consumers: names of the consumers that will `take`, so that what they await is kept for them from the start. Or
            a mapping of each name to its filter, as arguments of `take`: {"trainer": {"mode": "train"}}; nothing
            outside its filter is kept for a consumer.
        clock: "system" (default), or "manual" for tests (`store.testing.tick`).
        journal: a directory in which everything that happens is written down. A store that is started there again goes
            on where it was, and so does an actor that died, which Ray restarts. It must be reachable from every node
            on which the actor may be placed. Default: no journal.
        durability: when an answer may leave: "power" (default): once what it says is on disk; "process": once the
            operating system has it (a crash of the process loses nothing, a crash of the machine the newest); "none":
            at once.
        resume: "auto" (default): go on with the run in `journal` if it is of a store of this name, else begin one;
            "must": go on with the run that is there; "never": begin one, in an empty directory.
        journal_object_bytes: largest object of resources that the journal keeps, too, so that it outlives the process
            that published it. After a crash, work that needs a larger one is held back until it is published again.
            0 keeps none. Default: 64 MiB.
    """

    eviction_memory_threshold: float | int | None
    safe_memory_threshold: float | int | None
    span_size_estimator: Callable[[Span], int] | None
    default_config: RolloutConfig | None
    duplicate_spans: DuplicateSpans
    on_memory_full: OnMemoryFull
    max_deliveries: int
    suspect_patience_seconds: float
    max_queued: int | None
    retention: float | Mapping[str, float | None] | None
    keep_resources: int | None
    limits: Mapping[str, int] | None
    consumers: Sequence[str] | Set[str] | Mapping[str, Mapping[str, Any] | None] | None
    clock: Clock
    journal: str | os.PathLike[str] | None
    durability: Durability
    resume: Resume
    journal_object_bytes: int


@dataclass(slots=True)
class StoreConfig:
    """Checked options; plain data, so that they travel to an actor and can be compared.

    Not here: `resume`, which is about one start, and may differ between those who share a store.
    """

    eviction_memory_threshold: float | int | None = None
    safe_memory_threshold: float | int | None = None
    span_size_estimator: bytes | None = None  #: pickled: every client uses the same one, the actor never opens it
    default_config: tuple[Any, ...] = (None, None, 1, ())
    duplicate_spans: str = "reject"
    on_memory_full: str = "evict"
    max_deliveries: int = 3
    suspect_patience_seconds: float = 10.0
    max_queued: int | None = None
    retention: dict[str, Any] | None = None  #: max_age_seconds: float, max_rollouts: int, or one of them
    keep_resources: int | None = None
    limits: dict[str, int] = field(default_factory=dict)
    consumers: dict[str, dict[str, Any] | None] = field(default_factory=dict)  #: filter by name; None: not fixed yet
    clock: str = "system"
    journal: str | None = None
    durability: str = "power"
    journal_object_bytes: int = 64 * MIB

    def all_limits(self) -> dict[str, int]:
        """The limits with their defaults."""
        return DEFAULT_LIMITS | self.limits

    def estimator(self) -> Callable[[Span], int] | None:
        """The function that counts bytes of a span."""
        return None if self.span_size_estimator is None else pickle.loads(self.span_size_estimator)

    def differences(self, other: StoreConfig) -> list[str]:
        """Options that another configuration has with another value, for people to read."""
        found = []
        for name in self.__slots__:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                shown = "a function" if name == "span_size_estimator" else f"{theirs!r} there, {ours!r} asked for"
                found.append(f"{name}: {shown}")
        return found


#: Of options that are never None; with all others, None means the same as nothing.
_DEFAULTS = {one.name: one.default for one in fields(StoreConfig) if isinstance(one.default, (str, int, float))}
_DEFAULTS["resume"] = "auto"

#: The options as a signature shows them.
OPTIONS = [
    Parameter(name, Parameter.KEYWORD_ONLY, default=_DEFAULTS.get(name), annotation=annotation.__forward_arg__)
    for name, annotation in StoreOptions.__annotations__.items()
]


# -- from what a user writes to a configuration ------------------------------------------------------------------------


def make_config(**options: Unpack[StoreOptions]) -> StoreConfig:
    """A checked configuration; raises for a value that no machine could make valid."""
    resume = _one_of(get_args(Resume), "resume", options.pop("resume", "auto"))
    if options.get("journal") is None and resume == "must":
        raise InvalidValueError("resume", resume, "a journal= to resume from")
    given = {name: value for name, value in options.items() if value is not None or name in _DEFAULTS}
    config = StoreConfig(**{name: _CHECKS[name](name, value) for name, value in given.items()})
    resolve_thresholds(config, memory_capacity())
    return config


def directory(name: str, path: Any) -> str:
    """The path of a directory, absolute."""
    given = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(given, str) or not given or "\0" in given:
        raise InvalidValueError(name, path, "the path of a directory")
    return os.path.abspath(os.path.expanduser(given))


def _one_of(choices: Sequence[str], name: str, value: Any) -> str:
    if value not in choices:
        raise InvalidValueError(name, value, either([repr(one) for one in choices]) + meant(value, choices))
    return str(value)


def _patience(name: str, value: Any) -> float:
    expected = "a number of seconds, 0 or more"
    if not 0 <= (seconds := number(name, value, expected)) < math.inf:
        raise InvalidValueError(name, value, expected)
    return seconds


def _retention(name: str, value: Any) -> dict[str, Any]:
    expected = "seconds, or a dict with max_age_seconds and/or max_rollouts"
    rule = plain(name, value)
    rule = rule if isinstance(rule, dict) else {"max_age_seconds": rule}
    if not rule or rule.keys() - {"max_age_seconds", "max_rollouts"}:
        raise InvalidValueError(name, value, expected)
    chosen: dict[str, Any] = {}
    if (age := rule.get("max_age_seconds")) is not None:
        chosen["max_age_seconds"] = number(name, age, expected)
        if chosen["max_age_seconds"] < 0:
            raise InvalidValueError(name, value, expected)
    if (count := rule.get("max_rollouts")) is not None:
        chosen["max_rollouts"] = whole(name, count, at_least=0)
    return chosen


def _limits(name: str, value: Any) -> dict[str, int]:
    if not isinstance(value, Mapping):
        raise InvalidValueError(name, value, f"a mapping with {', '.join(DEFAULT_LIMITS)}, or some of them")
    sizes = {_one_of(tuple(DEFAULT_LIMITS), name, limit): size for limit, size in value.items()}
    return {limit: whole(f"{name}[{limit!r}]", size, at_least=1) for limit, size in sizes.items()}


def _default_config(name: str, value: Any) -> tuple[Any, ...]:
    from raystore.wire.checks import rollout_config

    return Config.of(rollout_config(name, value)).row()


def _consumers(name: str, value: Any) -> dict[str, dict[str, Any] | None]:
    from raystore.wire.checks import filter_arguments, identifier

    if isinstance(value, str) or not isinstance(value, (Sequence, Mapping, Set)):
        expected = f"names of consumers, or a mapping of each name to a filter ({', '.join(FILTERS)})"
        raise InvalidValueError(name, value, expected)
    chosen = value if isinstance(value, Mapping) else dict.fromkeys(value)
    made: dict[str, dict[str, Any] | None] = {}
    for consumer, filters in chosen.items():
        identifier(name, consumer)
        if filters is None:
            made[consumer] = None
        elif not isinstance(filters, Mapping) or set(filters) - set(FILTERS):
            raise InvalidValueError(f"{name}[{consumer!r}]", filters, f"None, or a mapping of {', '.join(FILTERS)}")
        else:
            made[consumer] = make_filter(**filter_arguments(**filters)) or {"status_in": list(USUAL)}
    return made


def _pickled(name: str, value: Any) -> bytes:
    if not callable(value):
        raise InvalidValueError(name, value, "a function from a Span to bytes")
    try:
        return pickler.dumps(value)
    except Exception as error:
        raise AgentNotPicklableError(f"{name} {value!r}", str(error)) from error


#: For each option of a configuration the function that checks its value, given its name, and returns it as plain data.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "eviction_memory_threshold": lambda _, value: scalar(value),  # `resolve_thresholds` looks at both together
    "safe_memory_threshold": lambda _, value: scalar(value),
    "span_size_estimator": _pickled,
    "default_config": _default_config,
    "duplicate_spans": partial(_one_of, get_args(DuplicateSpans)),
    "on_memory_full": partial(_one_of, get_args(OnMemoryFull)),
    "max_deliveries": partial(whole, at_least=1),
    "suspect_patience_seconds": _patience,
    "max_queued": partial(whole, at_least=1),
    "retention": _retention,
    "keep_resources": partial(whole, at_least=1),
    "limits": _limits,
    "consumers": _consumers,
    "clock": partial(_one_of, get_args(Clock)),
    "journal": directory,
    "durability": partial(_one_of, get_args(Durability)),
    "journal_object_bytes": partial(whole, at_least=0),
}


# -- from a configuration to the numbers of the core -------------------------------------------------------------------


def resolve_thresholds(config: StoreConfig, capacity_bytes: int) -> tuple[int, int]:
    """Eviction and safe threshold in bytes; a float is a ratio of the capacity, an int is bytes."""
    if capacity_bytes <= 0:
        raise ValueError(f"Detected memory capacity must be positive, got {capacity_bytes}")
    eviction, safe = config.eviction_memory_threshold, config.safe_memory_threshold
    if isinstance(eviction, float) and not 0 < eviction <= 1:
        raise ValueError(f"eviction_memory_threshold ratio must be greater than 0 and at most 1, got {eviction}")
    eviction = DEFAULT_EVICTION_RATIO if eviction is None else eviction
    eviction_bytes = _bytes("eviction_memory_threshold", eviction, capacity_bytes)
    if eviction_bytes < 1:
        raise ValueError(f"eviction_memory_threshold must be at least 1 bytes, got {eviction_bytes}")
    if isinstance(safe, float) and not 0 <= safe <= 1:
        raise ValueError(f"safe_memory_threshold ratio must be between 0 and 1 inclusive, got {safe}")
    safe = int(DEFAULT_SAFE_RATIO * eviction_bytes) if safe is None else safe
    safe_bytes = _bytes("safe_memory_threshold", safe, capacity_bytes)
    if safe_bytes >= eviction_bytes:
        raise ValueError(
            "safe_memory_threshold must be smaller than eviction_memory_threshold, "
            f"got {safe_bytes} and {eviction_bytes} bytes"
        )
    return eviction_bytes, safe_bytes


def _bytes(name: str, value: Any, capacity_bytes: int) -> int:
    if isinstance(value, float):
        return int(value * capacity_bytes)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r} must be a ratio (float), a number of bytes (int), or None")
    if value < 0:
        raise ValueError(f"{name} must be non-negative, got {value}")
    return value


def resolve(config: StoreConfig, capacity_bytes: int) -> Settings:
    """The plain numbers the core works with."""
    eviction_bytes, safe_bytes = resolve_thresholds(config, capacity_bytes)
    retention = config.retention or {}
    return Settings(
        eviction_bytes=eviction_bytes,
        safe_bytes=safe_bytes,
        spans_only=config.span_size_estimator is not None,
        keep_duplicates=config.duplicate_spans == "keep",
        pause_when_full=config.on_memory_full == "pause",
        max_deliveries=config.max_deliveries,
        suspect_patience_seconds=float(config.suspect_patience_seconds),
        max_queued=config.max_queued,
        retention_seconds=retention.get("max_age_seconds"),
        retention_count=retention.get("max_rollouts"),
        keep_resources=config.keep_resources,
        default_config=Config.of(config.default_config),
        on_disk=config.journal is not None,
        consumers=dict(config.consumers),
    )


def memory_capacity(*, object_store_bytes: int = 0) -> int:
    """Bytes this process may count on: the machine's memory, capped by the cgroup, less Ray's object store."""
    limits = [psutil.virtual_memory().total, *(_cgroup_limit(path) for path in CGROUP_LIMIT_FILES)]
    return int(min(limits)) - object_store_bytes


#: Where the kernel says how much memory this container may use, cgroup v2 and v1.
CGROUP_LIMIT_FILES = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def _cgroup_limit(path: Path) -> float:
    try:
        text = path.read_text().strip()
    except OSError:  # no such cgroup version here, or not readable: then it limits nothing we could know of
        return math.inf
    return float(text) if text.isdigit() and int(text) > 0 else math.inf
