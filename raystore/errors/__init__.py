"""Every error raystore raises, and the two exceptions an agent may raise.

Each error carries facts positionally, so that it survives pickling and the trip through an actor (which sends
the class name and `args`), and has a builtin as second base, so that an `except ValueError` written for the
reference goes on working. Messages use the reference's words where it has some.
Not here: errors of a journal (`journal`), and pydantic's `ValidationError`, which a model raises that a user makes of
malformed values.
"""

from __future__ import annotations

import reprlib
from typing import Any

from raystore.errors.base import StoreError as StoreError
from raystore.errors.journal import FencedError as FencedError
from raystore.errors.journal import JournalDamagedError as JournalDamagedError
from raystore.errors.journal import JournalError as JournalError
from raystore.errors.journal import JournalFailedError as JournalFailedError
from raystore.errors.journal import JournalFormatError as JournalFormatError
from raystore.errors.journal import JournalFullError as JournalFullError
from raystore.errors.journal import JournalHeldError as JournalHeldError
from raystore.errors.journal import JournalInUseError as JournalInUseError
from raystore.errors.journal import JournalMissingError as JournalMissingError
from raystore.errors.journal import ReadOnlyError as ReadOnlyError

NAMED = 5  #: things of one kind that an error names
SHOWN = 100  #: characters of a value that an error shows

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = SHOWN


def shown(value: Any) -> Any:
    """A value as an error carries it: plain, and no longer than a line. Shown again, it stays the same."""
    if value is None or type(value) in (bool, float) or (type(value) is int and abs(value) < 2**63):
        return value
    if type(value) is str:
        return value if len(value) <= SHOWN + 40 else f"{value[:SHOWN]}... ({len(value)} characters)"
    return f"<{type(value).__name__} {_SHORT.repr(value)[:SHOWN]}>"


class InvalidValueError(StoreError, ValueError):
    """An argument has a value that the store cannot accept; nothing was changed."""

    def __init__(self, name: str, value: Any, expected: str) -> None:
        super().__init__(name, shown(value), expected)

    def __str__(self) -> str:
        name, value, expected = self.args
        is_described = isinstance(value, str) and value[:1] + value[-1:] == "<>"
        return f"{name}={value if is_described else repr(value)} is not valid: expected {expected}"


class RolloutNotFoundError(StoreError, ValueError):
    """No rollout has this id: it was never enqueued here, or it has been deleted; nor any of the others, if told."""

    def __init__(self, rollout_id: str, *others: str) -> None:
        super().__init__(rollout_id, *others)

    def __str__(self) -> str:
        rollout_id, *others = self.args
        said = f"Rollout {rollout_id} not found: Item does not exist with primary key(s): rollout_id='{rollout_id}'"
        if others:
            more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
            said += f"; nor do {', '.join(map(repr, others[:NAMED]))}{more}"
        return (
            f"{said}. What is not found was never enqueued in this store, or has been deleted (delete_rollouts, "
            "retention=); ids are in what enqueue_rollout returned"
        )


class AttemptNotFoundError(StoreError, ValueError):
    """The rollout exists, the attempt does not; `attempt_id` is None when it has no attempt at all."""

    def __init__(self, rollout_id: str, attempt_id: str | None = None) -> None:
        super().__init__(rollout_id, attempt_id)

    def __str__(self) -> str:
        rollout_id, attempt_id = self.args
        if attempt_id is None:
            return f"No attempts found for rollout {rollout_id}"
        return f"Attempt {attempt_id} not found for rollout {rollout_id}"


class ResourcesNotFoundError(StoreError, ValueError):
    """No resources have this id."""

    def __init__(self, resources_id: str) -> None:
        super().__init__(resources_id)

    def __str__(self) -> str:
        return f"Resources {self.args[0]} not found"


class NoSuchResourceError(StoreError, KeyError):
    """An agent's resources have none of this name; with the names that they have, and where they are from."""

    def __init__(self, name: Any, names: list[str], source: str) -> None:
        super().__init__(shown(name), names, source)

    def __str__(self) -> str:
        name, names, source = self.args
        has = f"It has {', '.join(map(repr, names))}" if names else "It is empty"
        return f"ctx.resources has no {name!r}. {has}: {source}"


class ClaimLostError(StoreError, ValueError):
    """The claim was not acknowledged in time and somebody else may have the rollout now."""

    def __init__(self, rollout_id: str, attempt_id: str) -> None:
        super().__init__(rollout_id, attempt_id)

    def __str__(self) -> str:
        rollout_id, attempt_id = self.args
        return (
            f"Claim of attempt {attempt_id} of rollout {rollout_id} was lost: it was not acknowledged in time, so the "
            "rollout was offered again. Drop this work and claim the next rollout."
        )


class ConflictError(StoreError, ValueError):
    """A caller-given `rollout_id` exists with other content."""

    def __init__(self, rollout_id: str, differing: list[str]) -> None:
        super().__init__(rollout_id, differing)

    def __str__(self) -> str:
        rollout_id, differing = self.args
        return (
            f"Rollout {rollout_id} exists already with other content ({', '.join(differing)} differ). Use another "
            "rollout_id, or the same arguments to get the existing rollout."
        )


class SealedError(ConflictError):
    """A consumer has taken this rollout to train on it, so that its outcome stands."""

    def __init__(self, rollout_id: str, consumers: list[str]) -> None:
        super().__init__(rollout_id, consumers)

    def __str__(self) -> str:
        rollout_id, consumers = self.args
        return (
            f"Rollout {rollout_id} has been taken by consumer {', '.join(map(repr, consumers))} and cannot be run "
            "again or deleted: enqueue a new one, or give the batch back first (nack, rewind)."
        )


class BatchConflictError(ConflictError):
    """A consumer said of a batch what cannot be true; nothing was changed."""

    def __init__(self, consumer: str, why: str) -> None:
        super().__init__(consumer, why)  # type: ignore[arg-type]  # its arguments are its own

    def __str__(self) -> str:
        consumer, why = self.args
        return (
            f"Consumer {consumer!r}: {why}. After a restart, say rewind(consumer, step) with the step of the model "
            "that was loaded, and take again."
        )


class BatchHeldError(BatchConflictError):
    """A consumer holds as many batches as it may, and has consumed none of them yet; nothing was taken."""

    def __init__(self, consumer: str, held: list[Any], max_open: int) -> None:
        """`held`: number, how many rollouts, and whose, of each batch."""
        StoreError.__init__(self, consumer, held, max_open)

    def __str__(self) -> str:
        consumer, held, max_open = self.args
        shown = ", ".join(f"batch {number} ({count} rollouts, {whose})" for number, count, whose in held[:5])
        more = f", and {len(held) - 5} more" if len(held) > 5 else ""
        return (
            f"Consumer {consumer!r} holds {shown}{more} and has not said what became of it; max_open={max_open} "
            "batches may be open at once. Say ack(batch, step=...) once a step has consumed it, nack(batch) to give it "
            f"back, or rewind({consumer!r}, step) after a restart, and all that is held comes again. To hold several "
            "at once, for several ranks or to fetch ahead: take(..., max_open=...)."
        )


def _brief(filters: dict[str, Any] | str) -> str:
    text = str(filters)
    return text if len(text) <= 400 else text[:400] + "..."


class ConsumerFilterError(StoreError, ValueError):
    """A consumer asks for something else than it did before; nothing was taken."""

    def __init__(self, consumer: str, known: dict[str, Any] | str, asked: dict[str, Any] | str) -> None:
        super().__init__(consumer, _brief(known), _brief(asked))

    def __str__(self) -> str:
        consumer, known, asked = self.args
        return (
            f"Consumer {consumer!r} takes {known} since its first take, or since consumers= at the start of the store, "
            f"and now asks for {asked}. What a consumer awaits is kept for it, so that its filter stays: repeat it (or "
            "leave it out), take with another name for something else, or say forget_consumer first to begin anew."
        )


class OverloadedError(StoreError, RuntimeError):
    """The queue is full (`max_queued`), or the call is larger than it may be; nothing was enqueued."""

    def __init__(self, queued: int, max_queued: int, retry_after_seconds: float, asked: int = 1) -> None:
        super().__init__(queued, max_queued, retry_after_seconds, asked)
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        queued, max_queued, retry_after, asked = self.args
        if asked > max_queued:
            return (
                f"One call enqueues {asked} rollouts and max_queued is {max_queued}, so it can never succeed. "
                "Cut it into smaller calls, or raise max_queued."
            )
        return (
            f"The queue is full: {queued} rollouts wait and max_queued is {max_queued}. Runners are slower than the "
            f"driver; wait for completions and try again in {retry_after:g} s, or raise max_queued."
        )


class StoreOverloadedError(OverloadedError):
    """Something of which a store holds only so much has reached its bound; nothing was changed."""

    def __init__(self, what: str, number: int, bound: int, retry_after_seconds: float) -> None:
        StoreError.__init__(self, what, number, bound, retry_after_seconds)
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        what, number, bound, retry_after = self.args
        return (
            f"The store holds {number} {what}, and its bound is {bound}: more is asked of it than it can do, or "
            f"something leaks. Nothing was changed; try again in {retry_after:g} s, and look at `statistics()`."
        )


class CursorTooOldError(StoreError, LookupError):
    """The change feed no longer holds what follows this cursor."""

    def __init__(self, cursor: int, oldest: int) -> None:
        super().__init__(cursor, oldest)
        self.oldest = oldest

    def __str__(self) -> str:
        cursor, oldest = self.args
        return (
            f"Cursor {cursor} is too old: the change feed is bounded and its oldest entry is {oldest}. "
            f"Continue with cursor={oldest - 1} (changes between are lost to you), and read more often."
        )


class SpansEvictedError(StoreError, RuntimeError):
    """Spans of this rollout were evicted to stay below the memory threshold."""

    def __init__(self, rollout_id: str) -> None:
        super().__init__(rollout_id)

    def __str__(self) -> str:
        return f"Spans for rollout {self.args[0]} have been evicted"


class AnswerGoneError(StoreError, LookupError):
    """The rest of a long answer is gone: the store was restarted, or has had too many others to keep it."""

    def __init__(self, token: int) -> None:
        super().__init__(token)

    def __str__(self) -> str:
        return f"The rest of a long answer ({self.args[0]}) is gone; ask again"


class PayloadLostError(StoreError, LookupError):
    """The value behind a record is gone: its owner died, or a newer version replaced it."""

    resources: tuple[str, int] | None = None  #: id and version, of an object of resources that was read

    def __init__(self, what: str, why: str) -> None:
        super().__init__(what, why)

    def __str__(self) -> str:
        what, why = self.args
        return f"The value of {what} is lost: {why}"


class PayloadNotReadableError(StoreError, RuntimeError):
    """A value was stored and cannot be decoded in this process; the rest of its record can be read.

    `module` is the name of the module that is missing here, None if it is something else.
    """

    def __init__(self, what: str, module: str | None, why: str) -> None:
        super().__init__(what, module, why)
        self.module = module

    def __str__(self) -> str:
        what, module, why = self.args
        if module is None:
            do = "Was it written by another version of its class? Its writer can read it, or store plain data instead."
        else:
            do = (
                f"Install the package of {module!r} here, or put its folder on this process's path (PYTHONPATH, "
                "runtime_env of Ray); or store plain data, which needs no module."
            )
        return f"The {what} cannot be read in this process ({why}). It is kept as it was stored. {do}"


class PayloadTooLargeError(StoreError, ValueError):
    """One value, span or call is larger than the store's limit for it."""

    def __init__(self, what: str, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(what, size_bytes, limit_bytes)

    def __str__(self) -> str:
        what, size, limit = self.args
        return (
            f"{what} is {size} bytes and the limit is {limit}. Pass a reference instead (ObjectResource, "
            "ray.put, or a path), or raise it with limits= when the store is started."
        )


class PayloadNotPicklableError(StoreError, TypeError):
    """A value cannot be sent: it is neither plain data nor something that cloudpickle can pickle."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(what, why)

    def __str__(self) -> str:
        what, why = self.args
        return (
            f"{what} cannot be pickled ({why}); nothing was changed. Pass plain data, or what the value is made from: "
            "a path, a name, or a reference (ObjectResource, ray.put)."
        )


class StoreUnavailableError(StoreError, ConnectionError):
    """The store cannot be reached: its actor is dead, or did not answer for as long as clients retry."""

    def __init__(self, store: str, why: str) -> None:
        super().__init__(store, why)

    def __str__(self) -> str:
        store, why = self.args
        return f"Store {store} is unavailable: {why}"


class OutcomeUnknownError(StoreUnavailableError):
    """A write may or may not have taken effect; read the record before you repeat it."""


class SessionEndedError(StoreError, RuntimeError):
    """The session of this operation ended before its turn came, so that it was not run."""

    def __init__(self, session_id: str) -> None:
        super().__init__(session_id)

    def __str__(self) -> str:
        return (
            f"Session {self.args[0]} ended before this operation ran: its process was reported to have ended, or was "
            "silent for too long. Nothing was changed by it; the next call opens a new session."
        )


class StoreClosedError(StoreError, RuntimeError):
    """This client, or the store behind it, has been closed."""

    def __init__(self, store: str) -> None:
        super().__init__(store)

    def __str__(self) -> str:
        return f"Store {self.args[0]} is closed; start or connect to a store again"


class ForkedError(StoreError, RuntimeError):
    """This process was forked from one that had used the store, or was connected to Ray; neither survives a fork."""

    def __init__(self, store: str) -> None:
        super().__init__(store)

    def __str__(self) -> str:
        return (
            f"{self.args[0]} was used before this process was forked, and does not work in the child: its threads are "
            "the parent's. Start the child by 'spawn' or 'forkserver' (multiprocessing.get_context('spawn'), "
            "DataLoader(multiprocessing_context='spawn')) and pass it a store of rs.start() or rs.connect(), or leave "
            "the store to the parent."
        )


class RayClientError(StoreError, RuntimeError):
    """This process reaches its cluster by Ray Client (ray://), over which a store cannot be used."""

    def __init__(self, address: str) -> None:
        super().__init__(address)

    def __str__(self) -> str:
        return (
            f"Ray Client ({self.args[0]}) is not supported: a store's driver takes part in the cluster itself. Submit "
            "it with `ray job submit`, or run it on a node of the cluster with address='auto'."
        )


class StoreCorruptError(StoreError, RuntimeError):
    """The core failed where it must not: its state can no longer be trusted and takes no more writes."""

    def __init__(self, verb: str, story: str, traceback: str) -> None:
        super().__init__(verb, story, traceback)

    def __str__(self) -> str:
        verb, story, trace = self.args
        return (
            f"The store failed inside {verb} and takes no more writes, since its state can no longer be trusted. "
            f"This is a bug in raystore; please report it with the following.\n{story}\n{trace}"
        )


class StoreNotFoundError(StoreError, LookupError):
    """No store has this name in this namespace."""

    def __init__(self, name: str | None, namespace: str, existing: list[str]) -> None:
        super().__init__(name, namespace, existing)

    def __str__(self) -> str:
        name, namespace, existing = self.args
        there = f"stores there: {', '.join(map(repr, existing))}" if existing else "there is no store there"
        if name is None and existing:
            return f"Several stores run in namespace {namespace!r} ({there}). Say which: rs.connect({existing[0]!r})."
        wanted = "No store" if name is None else f"No store {name!r}"
        do = (
            f"Type rs.connect({existing[0]!r})"
            if existing
            else f"Start one: rs.start({name!r})"
            if name
            else ("Start one: rs.start()")
        )
        return f"{wanted} in namespace {namespace!r}; {there}. {do}, or pass another namespace= or address=."


class StoreExistsError(StoreError, ValueError):
    """A store of this name exists already, or exists with another configuration."""

    def __init__(self, name: str, namespace: str, differing: list[str]) -> None:
        super().__init__(name, namespace, differing)

    def __str__(self) -> str:
        name, namespace, differing = self.args
        if differing:
            return (
                f"Store {name!r} in namespace {namespace!r} runs with another configuration: {'; '.join(differing)}. "
                f"Use rs.connect({name!r}) to take it as it is, rs.stop({name!r}) to end it, or another name."
            )
        return (
            f"A store {name!r} exists already in namespace {namespace!r}. Use rs.connect({name!r}) or "
            f"rs.start({name!r}, exist='attach') to share it, rs.stop({name!r}) to end it, or another name."
        )


class NotAStoreError(StoreError, TypeError):
    """An actor, handle or name does not belong to a raystore store."""

    def __init__(self, what: str) -> None:
        super().__init__(what)

    def __str__(self) -> str:
        return (
            f"{self.args[0]} is not a raystore store. Pass store.actor of a store made by rs.start(), "
            "or find one by name: rs.list_stores(), rs.connect(name)."
        )


class ProtocolMismatchError(StoreError, RuntimeError):
    """Client and store speak different versions of the session protocol."""

    def __init__(self, client: str, store: str) -> None:
        super().__init__(client, store)

    def __str__(self) -> str:
        client, store = self.args
        return f"The client is {client} and the store is {store}: install the same raystore on both sides."


class AgentNotPicklableError(StoreError, TypeError):
    """The agent cannot be sent to runner actors."""

    def __init__(self, agent: str, why: str) -> None:
        super().__init__(agent, why)

    def __str__(self) -> str:
        agent, why = self.args
        return (
            f"Agent {agent} cannot be pickled, so no runner was started: {why}. Create what cannot be pickled "
            "(clients, locks, open files) inside the agent, or in setup() of an agent class."
        )


class AgentProcessError(StoreError, RuntimeError):
    """No process could be made for an agent (`isolation="process"`)."""

    def __init__(self, why: str) -> None:
        super().__init__(why)

    def __str__(self) -> str:
        return f"An agent's process could not be made: {self.args[0]}"


class PoolStartError(StoreError, RuntimeError):
    """The runners of a pool did not start: they could not be made or scheduled in time, or their agent is slow.

    `setting_up` is the number of runners that are there, and whose agent gets ready.
    """

    def __init__(self, asked: str, available: str, cause: str | None = None, setting_up: int = 0) -> None:
        super().__init__(asked, available, cause, setting_up)

    def __str__(self) -> str:
        asked, available, cause, setting_up = self.args
        if cause is not None:
            return f"A runner could not be made: {cause}. Asked for: {asked}. The cluster has: {available}."
        if setting_up:
            return (
                f"Runners did not start in time, and not for want of resources: {setting_up} of them are there, and "
                f"__init__ or setup() of their agent has not ended. Asked for: {asked}. Give a slow agent more time "
                "with RunnerPool(start_timeout=...)"
            )
        return (
            f"Runners did not start in time. Asked for: {asked}. The cluster has: {available}. If that is too little, "
            "ask for less (num_cpus=, num_gpus=, resources=) or add nodes; if it is enough, their processes take long "
            "to start (runtime_env=): raise start_timeout="
        )


class PoolFailedError(StoreError, RuntimeError):
    """What a call waits for is never done: only a pool would do it whose runners fail before they are ready."""

    def __init__(self, pool_id: str, failures: int, queues: list[str], cause: str) -> None:
        super().__init__(pool_id, failures, queues, cause)

    def __str__(self) -> str:
        pool_id, failures, queues, cause = self.args
        return (
            f"Nobody works for the queues {', '.join(map(repr, queues))}: pool {pool_id} has failed {failures} times "
            f"to make a runner, the last time with: {cause}. It goes on trying, less and less often; what waits in "
            "its queues stays there. Mend the cause, or start a pool that works"
        )


class Abort(Exception):
    """Raised by an agent: the infrastructure failed (a sandbox, an endpoint); the rollout is delivered again."""


class Drop(Exception):
    """Raised by an agent: this rollout is to be neither retried nor trained on."""


#: What an actor may name in an error record; anything else would be a name that a peer made up.
BY_NAME: dict[str, type[Exception]] = {
    cls.__name__: cls for cls in list(globals().values()) if isinstance(cls, type) and issubclass(cls, StoreError)
} | {cls.__name__: cls for cls in (AssertionError, LookupError, RuntimeError, TypeError, ValueError)}

_PLAIN = (str, int, float, bool, type(None), list)


def to_record(error: Exception) -> tuple[str, list[Any]]:
    """Render an error as class name and plain positional arguments."""
    if type(error).__name__ not in BY_NAME:
        return "StoreError", [f"{type(error).__name__}: {error}"]
    return type(error).__name__, [arg if isinstance(arg, _PLAIN) else repr(arg) for arg in error.args]


def again(error: Exception) -> Exception:
    """The same error as a new object: one that is raised more than once would gather the tracebacks of all."""
    return type(error)(*error.args)


def from_record(name: str, args: list[Any]) -> Exception:
    """Build the error a record stands for, as a clean local exception."""
    return BY_NAME.get(name, StoreError)(*args)
