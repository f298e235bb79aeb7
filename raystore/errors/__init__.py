"""Every error that raystore raises, and the two exceptions that an agent may raise.

A class names its facts, in the order in which it is constructed. Each fact is an attribute of the error, and all of
them are its `args`: so an error survives pickling, and the trip through an actor or a journal as its class name and
`args` (`to_record`). A message says what happened, the likely cause, and what to do. Many errors are also a builtin, so
that an `except ValueError` written for the reference goes on working.
Not here: pydantic's `ValidationError`, which a model raises whose user gives it malformed values.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from inspect import Parameter, Signature
from typing import Any, dataclass_transform

from raystore.errors.text import NAMED, quoted, shown

__all__ = [
    "Abort", "AgentNotPicklableError", "AgentProcessError", "AnswerGoneError", "AttemptNotFoundError",
    "AttemptOverError", "BatchConflictError", "BatchHeldError", "ClaimLostError", "ConflictError",
    "ConsumerFilterError", "ConsumerUnitError", "CursorTooOldError", "DatasetChangedError", "Drop",
    "EvaluationConflictError", "EvaluationNotFoundError", "FailureBudgetError", "FeedClosedError", "FeedHeldError",
    "FeedNotFoundError", "FencedError", "FilteredTooManyError", "ForkedError", "GroupConflictError",
    "InvalidValueError", "JournalDamagedError", "JournalError", "JournalFailedError", "JournalFormatError",
    "JournalFullError", "JournalHeldError", "JournalInUseError", "JournalMissingError", "NoSuchResourceError",
    "NotAStoreError", "OutcomeUnknownError", "OverloadedError", "PayloadLostError", "PayloadNotPicklableError",
    "PayloadNotReadableError", "PayloadTooLargeError", "PoolFailedError", "PoolStartError", "ProtocolMismatchError",
    "RayClientError", "ReadOnlyError", "ResourcesNotFoundError", "RolloutNotFoundError", "RolloutSucceededError",
    "SealedError", "SessionEndedError", "SpansEvictedError", "StoreClosedError", "StoreCorruptError", "StoreError",
    "StoreExistsError", "StoreNotFoundError", "StoreOverloadedError", "StoreUnavailableError", "VersionConflictError",
    "VersionNotFoundError",
]  # fmt: skip


class StoreError(Exception):
    """The root of raystore's errors."""


@dataclass_transform(eq_default=False, frozen_default=True)
class _Facts(StoreError):
    """The base of errors with facts. A subclass annotates its facts, and names them in `_message`.

    Like a dataclass, it is constructed with the facts of its base and its own; one with an `__init__` of its own calls
    `_set` instead, with its facts in the order of `args`, and may have other facts than its base.
    """

    _message = ""
    _signature = Signature()
    __signature__: Signature | None  #: as `inspect` and `help` show it

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.__init__ is not _Facts.__init__:
            cls.__signature__ = None  # that of its `__init__`
            return
        parameters = [*cls._signature.parameters.values()]
        for name, annotation in inspect.get_annotations(cls).items():
            default = vars(cls).get(name, Parameter.empty)
            parameters.append(Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation))
            if default is not Parameter.empty:
                delattr(cls, name)  # Ray's subclass of it looks for what it does not have at the error that it wraps
        cls.__signature__ = cls._signature = Signature(parameters)

    def __init__(self, *facts: Any, **named: Any) -> None:
        bound = self._signature.bind(*facts, **named)
        bound.apply_defaults()
        self._set(**bound.arguments)

    def _set(self, **facts: Any) -> None:
        vars(self).update(facts)
        self.args: tuple[Any, ...] = tuple(facts.values())

    def __str__(self) -> str:
        return self._message.format(**vars(self))


class InvalidValueError(_Facts, ValueError):
    """An argument has a value that the store cannot accept; nothing was changed."""

    name: str  #: of the argument, with the way to the value within it: `config.max_attempts`
    value: Any  #: plain and short: a description in <> instead of an object
    expected: str

    def __init__(self, name: str, value: Any, expected: str) -> None:
        self._set(name=name, value=shown(value), expected=expected)

    def __str__(self) -> str:
        name, value, expected = self.args
        is_described = isinstance(value, str) and value[:1] + value[-1:] == "<>"
        return f"{name}={value if is_described else repr(value)} is not valid: expected {expected}"


class RolloutNotFoundError(_Facts, ValueError):
    """No rollout has this id: it was never enqueued here, or it has been deleted."""

    rollout_id: str
    others: tuple[str, ...]  #: ids that were not found either

    def __init__(self, rollout_id: str, *others: str) -> None:
        self._set(rollout_id=rollout_id, others=others)
        self.args: tuple[Any, ...] = (rollout_id, *others)

    def __str__(self) -> str:
        ids, others = self.rollout_id, self.others
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        return (
            f"Rollout {ids} not found: Item does not exist with primary key(s): rollout_id='{ids}'"
            f"{f'; nor do {quoted(others[:NAMED])}{more}' if others else ''}. What is not found was never enqueued in "
            "this store, or has been deleted (delete_rollouts, retention=); ids are in what enqueue_rollout returned"
        )


class AttemptNotFoundError(_Facts, ValueError):
    """The rollout exists, the attempt does not."""

    rollout_id: str
    attempt_id: str | None = None  #: None if the rollout has no attempt at all

    def __str__(self) -> str:
        if self.attempt_id is None:
            return f"No attempts found for rollout {self.rollout_id}"
        return f"Attempt {self.attempt_id} not found for rollout {self.rollout_id}"


class ResourcesNotFoundError(_Facts, ValueError):
    """No resources have this id."""

    resources_id: str
    _message = "Resources {resources_id} not found"


class NoSuchResourceError(_Facts, KeyError):
    """An agent's resources have none of this name."""

    name: Any
    names: list[str]  #: that there are
    source: str  #: where these resources are from

    def __init__(self, name: Any, names: list[str], source: str) -> None:
        self._set(name=shown(name), names=names, source=source)

    def __str__(self) -> str:
        has = f"It has {quoted(self.names)}" if self.names else "It is empty"
        return f"ctx.resources has no {self.name!r}. {has}: {self.source}"


class ClaimLostError(_Facts, ValueError):
    """The claim was not acknowledged in time, and the rollout was offered again."""

    rollout_id: str
    attempt_id: str
    _message = (
        "Claim of attempt {attempt_id} of rollout {rollout_id} was lost: it was not acknowledged in time, so the "
        "rollout was offered again. Drop this work and claim the next rollout."
    )


class AttemptOverError(_Facts, ValueError):
    """The attempt has ended, or another one was started after it: its state is neither saved nor given out."""

    rollout_id: str
    attempt_id: str
    outcome: str  #: what became of it: "superseded", "timeout", "cancelled" and so on
    _message = (
        "Attempt {attempt_id} of rollout {rollout_id} is over ({outcome}), so that nothing goes on from what it saves "
        "now; what it had saved before stays. Drop this work: the rollout has ended, or another attempt has it."
    )


class ConflictError(_Facts, ValueError):
    """A caller-given `rollout_id` exists with other content; or, in subclasses, another conflict with what is kept."""

    rollout_id: str | None  #: None if the conflict is about a batch
    differing: Sequence[str]  #: names of the arguments that differ

    def __str__(self) -> str:
        return (
            f"Rollout {self.rollout_id} exists already with other content ({', '.join(self.differing)} differ). Use "
            "another rollout_id, or the same arguments to get the existing rollout."
        )


class GroupConflictError(ConflictError):
    """A caller-given `group_id` exists with other content; nothing was enqueued."""

    group_id: str
    differing: Sequence[str]  #: names of the arguments that differ

    def __init__(self, group_id: str, differing: Sequence[str]) -> None:
        self._set(group_id=group_id, differing=differing)
        vars(self).update(rollout_id=None)

    def __str__(self) -> str:
        return (
            f"Group {self.group_id} exists already with other content ({', '.join(self.differing)} differ). Use "
            "another group_id, or the same arguments to get the existing group."
        )


class SealedError(ConflictError):
    """A consumer has taken this rollout to train on it, so that its outcome stands."""

    rollout_id: str
    consumers: list[str]  #: that took it

    def __init__(self, rollout_id: str, consumers: list[str]) -> None:
        self._set(rollout_id=rollout_id, consumers=consumers)
        vars(self).update(differing=())

    def __str__(self) -> str:
        return (
            f"Rollout {self.rollout_id} has been taken by consumer {quoted(self.consumers)} and cannot be run again or "
            "deleted: enqueue a new one (requeue does, if it has failed), or give the batch back first (nack, rewind)."
        )


class RolloutSucceededError(ConflictError):
    """A rollout that has succeeded is not requeued; nothing was changed."""

    rollout_id: str

    def __init__(self, rollout_id: str) -> None:
        self._set(rollout_id=rollout_id)
        vars(self).update(differing=())

    def __str__(self) -> str:
        return (
            f"Rollout {self.rollout_id} has succeeded, and only what has failed or was cancelled is requeued: leave it "
            "out. To run its task once more, enqueue it as a new rollout: enqueue_rollout(rollout.input)"
        )


class BatchConflictError(ConflictError):
    """What a consumer said of a batch cannot be true; nothing was changed."""

    consumer: str
    why: str

    def __init__(self, consumer: str, why: str) -> None:
        self._set(consumer=consumer, why=why)
        vars(self).update(rollout_id=None, differing=())

    def __str__(self) -> str:
        return (
            f"Consumer {self.consumer!r}: {self.why}. After a restart, say rewind(consumer, step) with the step of the "
            "model that was loaded, and take again."
        )


class BatchHeldError(BatchConflictError):
    """A consumer holds as many batches as it may, and has consumed none of them yet; nothing was taken."""

    held: list[Any]  #: of each batch: its number, how many rollouts it has, and which session holds it
    max_open: int  #: batches that may be open at once
    silent_seconds: float | None  #: since all other sessions that hold one have spoken; None if this process holds all

    def __init__(self, consumer: str, held: list[Any], max_open: int, silent_seconds: float | None = None) -> None:
        self._set(consumer=consumer, held=held, max_open=max_open, silent_seconds=silent_seconds)
        vars(self).update(rollout_id=None, differing=(), why="it holds as many batches as it may")

    def __str__(self) -> str:
        batches = ", ".join(f"batch {number} ({count} rollouts, {whose})" for number, count, whose in self.held[:NAMED])
        more = f", and {len(self.held) - NAMED} more" if len(self.held) > NAMED else ""
        return (
            f"Consumer {self.consumer!r} holds {batches}{more} and has not said what became of it; "
            f"max_open={self.max_open} batches may be open at once. Say ack(batch, step=...) once a step has consumed "
            f"it, nack(batch) to give it back, or rewind({self.consumer!r}, step) after a restart, and all that is "
            "held comes again. To hold several at once, for several ranks or to fetch ahead: take(..., max_open=...)."
        )


class VersionConflictError(ConflictError):
    """A step of the policy cannot be published under this version; nothing was published."""

    feed: str
    version: int
    why: str

    def __init__(self, feed: str, version: int, why: str) -> None:
        self._set(feed=feed, version=version, why=why)
        vars(self).update(rollout_id=None, differing=())

    def __str__(self) -> str:
        return (
            f"Feed {self.feed!r} cannot publish version {self.version}: {self.why}. Publish each step of the model "
            "once, and say restore(step) after the model was loaded again, which begins a new branch of versions."
        )


class EvaluationConflictError(ConflictError):
    """An evaluation of this name and version exists already with other content; nothing was enqueued."""

    name: str
    version: int | None  #: of the policy
    differing: Sequence[str]  #: names of the arguments that differ

    def __init__(self, name: str, version: int | None, differing: Sequence[str]) -> None:
        self._set(name=name, version=version, differing=differing)
        vars(self).update(rollout_id=None)

    def __str__(self) -> str:
        of = "without a version" if self.version is None else f"of version {self.version}"
        return (
            f"Evaluation {self.name!r} {of} exists already with other content ({', '.join(self.differing)} differ). "
            "Its results are not comparable with what is asked for now: give this one another name=, or repeat the "
            "same arguments to get the existing one, finished or not."
        )


class EvaluationNotFoundError(_Facts, LookupError):
    """No evaluation has this name and version."""

    name: str
    version: int | None  #: None if any was asked for
    names: list[str]  #: that there are

    def __str__(self) -> str:
        which = "" if self.version is None else f" of version {self.version}"
        there = f"there are {quoted(self.names)}" if self.names else "there is none"
        return (
            f"There is no evaluation {self.name!r}{which} in this store; {there}. One begins with "
            "feed.evaluate(items, version=step) or store.evaluate(name, items); store.evaluations() lists them."
        )


class VersionNotFoundError(_Facts, LookupError):
    """A version of the policy cannot be evaluated: it was never published, was undone, or was freed since."""

    resources_id: str
    version: int  #: of the policy
    there: list[int]  #: versions that can be had

    def __str__(self) -> str:
        there = f"Those that can be had are {', '.join(map(str, self.there))}" if self.there else "None can be had"
        return (
            f"Version {self.version} of resources {self.resources_id!r} cannot be evaluated: it was never published, "
            f"was undone by a restore, or is freed since newer ones came. {there}. Say evaluate(items, version=step) "
            "right after publish(weights, version=step), which keeps that version until the evaluation has ended; or "
            "publish it under another resources_id, for store.evaluate(name, items, resources_id=..., version=...)."
        )


class ConsumerFilterError(_Facts, ValueError):
    """A consumer asks for something else than it did before; nothing was taken."""

    consumer: str
    known: str  #: the filter that is kept for it
    asked: str  #: the filter of this call
    _message = (
        "Consumer {consumer!r} takes {known} since its first take, or since consumers= at the start of the store, "
        "and now asks for {asked}. What a consumer awaits is kept for it, so that its filter stays: repeat it (or "
        "leave it out), take with another name for something else, or say forget_consumer first to begin anew."
    )

    def __init__(self, consumer: str, known: dict[str, Any] | str, asked: dict[str, Any] | str) -> None:
        known, asked = (text if len(text) <= 400 else text[:400] + "..." for text in (str(known), str(asked)))
        self._set(consumer=consumer, known=known, asked=asked)


class ConsumerUnitError(_Facts, ValueError):
    """A consumer of rollouts asks for groups, or the other way round; nothing was taken."""

    consumer: str
    takes: str  #: "rollouts" or "groups", since its first take
    asked: str  #: what this call asks for
    _message = (
        "Consumer {consumer!r} has taken {takes} since its first take, and now asks for {asked}. A consumer takes one "
        "or the other, so that nothing comes to it twice: take with another name, or say forget_consumer first to "
        "begin anew."
    )


class OverloadedError(_Facts, RuntimeError):
    """The queue is full (`max_queued`), or the call is larger than it may be; nothing was enqueued."""

    number: int  #: of rollouts that wait in queues; in `StoreOverloadedError` of `what` the store holds
    bound: int  #: how many there may be (`max_queued`)
    retry_after_seconds: float
    asked: int  #: how many rollouts the call enqueues

    def __init__(self, number: int, bound: int, retry_after_seconds: float, asked: int = 1) -> None:
        self._set(number=number, bound=bound, retry_after_seconds=retry_after_seconds, asked=asked)

    def __str__(self) -> str:
        if self.asked > self.bound:
            return (
                f"One call enqueues {self.asked} rollouts and max_queued is {self.bound}, so it can never succeed. "
                "Cut it into smaller calls, or raise max_queued."
            )
        return (
            f"The queue is full: {self.number} rollouts wait and max_queued is {self.bound}. Runners are slower than "
            f"the driver; wait for completions and try again in {self.retry_after_seconds:g} s, or raise max_queued."
        )


class StoreOverloadedError(OverloadedError):
    """Something of which a store holds only so much has reached its bound; nothing was changed."""

    what: str  #: things that are counted, with their unit

    def __init__(self, what: str, number: int, bound: int, retry_after_seconds: float) -> None:
        self._set(what=what, number=number, bound=bound, retry_after_seconds=retry_after_seconds)
        vars(self).update(asked=1)

    def __str__(self) -> str:
        return (
            f"The store holds {self.number} {self.what}, and its bound is {self.bound}: more is asked of it than it "
            "can do, or something leaks. Nothing was changed; try again in "
            f"{self.retry_after_seconds:g} s, and look at `statistics()`."
        )


class CursorTooOldError(_Facts, LookupError):
    """The change feed no longer holds what follows this cursor."""

    cursor: int
    oldest: int  #: entry that the feed holds

    def __str__(self) -> str:
        return (
            f"Cursor {self.cursor} is too old: the change feed is bounded and its oldest entry is {self.oldest}. "
            f"Continue with cursor={self.oldest - 1} (changes between are lost to you), and read more often."
        )


class SpansEvictedError(_Facts, RuntimeError):
    """Spans of this rollout were evicted to stay below the memory threshold."""

    rollout_id: str
    _message = "Spans for rollout {rollout_id} have been evicted"


class AnswerGoneError(_Facts, LookupError):
    """The rest of a long answer is gone: the store was restarted, or has had too many others to keep it."""

    token: int  #: by which the rest was asked for
    _message = "The rest of a long answer ({token}) is gone; ask again"


class PayloadLostError(_Facts, LookupError):
    """The value behind a record is gone: its owner died, or a newer version replaced it."""

    what: str
    why: str
    resources: tuple[str, int] | None = None  #: id and version, if an object of resources was read
    _message = "The value of {what} is lost: {why}"


class PayloadNotReadableError(_Facts, RuntimeError):
    """A value was stored and cannot be decoded in this process; the rest of its record can be read."""

    what: str
    module: str | None  #: name of the module that is missing here; None if the cause is another one
    why: str

    def __str__(self) -> str:
        if self.module is None:
            do = "Was it written by another version of its class? Its writer can read it, or store plain data instead."
        else:
            do = (
                f"Install the package of {self.module!r} here, or put its folder on this process's path (PYTHONPATH, "
                "runtime_env of Ray); or store plain data, which needs no module."
            )
        return f"The {self.what} cannot be read in this process ({self.why}). It is kept as it was stored. {do}"


class PayloadTooLargeError(_Facts, ValueError):
    """One value, span or call is larger than the store's limit for it."""

    what: str
    size_bytes: int
    limit_bytes: int
    _message = (
        "{what} is {size_bytes} bytes and the limit is {limit_bytes}. Pass a reference instead (ObjectResource, "
        "ray.put, or a path), or raise it with limits= when the store is started."
    )


class PayloadNotPicklableError(_Facts, TypeError):
    """A value cannot be sent: it is neither plain data nor something that cloudpickle can pickle."""

    what: str
    why: str
    _message = (
        "{what} cannot be pickled ({why}); nothing was changed. Pass plain data, or what the value is made from: "
        "a path, a name, or a reference (ObjectResource, ray.put)."
    )


class StoreUnavailableError(_Facts, ConnectionError):
    """The store cannot be reached: its actor is dead, or did not answer for as long as clients retry."""

    store: str
    why: str
    _message = "Store {store} is unavailable: {why}"


class OutcomeUnknownError(StoreUnavailableError):
    """A write may or may not have taken effect; read the record before you repeat it."""


class SessionEndedError(_Facts, RuntimeError):
    """The session of this operation ended before its turn came, so that it was not run."""

    session_id: str
    _message = (
        "Session {session_id} ended before this operation ran: its process was reported to have ended, or was "
        "silent for too long. Nothing was changed by it; the next call opens a new session."
    )


class StoreClosedError(_Facts, RuntimeError):
    """This client, or the store behind it, has been closed."""

    store: str
    _message = "Store {store} is closed; start or connect to a store again"


class ForkedError(_Facts, RuntimeError):
    """This process was forked from one that had used the store, or was connected to Ray; neither survives a fork."""

    store: str  #: the store, or Ray
    _message = (
        "{store} was used before this process was forked, and does not work in the child: its threads are "
        "the parent's. Start the child by 'spawn' or 'forkserver' (multiprocessing.get_context('spawn'), "
        "DataLoader(multiprocessing_context='spawn')) and pass it a store of rs.start() or rs.connect(), or leave "
        "the store to the parent."
    )


class RayClientError(_Facts, RuntimeError):
    """This process reaches its cluster by Ray Client (ray://), over which a store cannot be used."""

    address: str
    _message = (
        "Ray Client ({address}) is not supported: a store's driver takes part in the cluster itself. Submit "
        "it with `ray job submit`, or run it on a node of the cluster with address='auto'."
    )


class StoreCorruptError(_Facts, RuntimeError):
    """The core failed where it must not: its state can no longer be trusted and takes no more writes."""

    verb: str  #: operation that failed
    story: str  #: newest changes of what it worked on
    traceback: str
    _message = (
        "The store failed inside {verb} and takes no more writes, since its state can no longer be trusted. "
        "This is a bug in raystore; please report it with the following.\n{story}\n{traceback}"
    )


class StoreNotFoundError(_Facts, LookupError):
    """No store has this name in this namespace."""

    name: str | None  #: None if none was asked for
    namespace: str
    existing: list[str]  #: names of the stores there

    def __str__(self) -> str:
        name, namespace, existing = self.args
        there = f"stores there: {quoted(existing)}" if existing else "there is no store there"
        if name is None and existing:
            return f"Several stores run in namespace {namespace!r} ({there}). Say which: rs.connect({existing[0]!r})."
        wanted = "No store" if name is None else f"No store {name!r}"
        do = f"Type rs.connect({existing[0]!r})" if existing else f"Start one: rs.start({repr(name) if name else ''})"
        return f"{wanted} in namespace {namespace!r}; {there}. {do}, or pass another namespace= or address=."


class StoreExistsError(_Facts, ValueError):
    """A store of this name exists already, or exists with another configuration."""

    name: str
    namespace: str
    differing: list[str]  #: options with another value, each as a sentence has it

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


class NotAStoreError(_Facts, TypeError):
    """An actor, handle or name does not belong to a raystore store."""

    what: str
    _message = (
        "{what} is not a raystore store. Pass store.actor of a store made by rs.start(), "
        "or find one by name: rs.list_stores(), rs.connect(name)."
    )


class ProtocolMismatchError(_Facts, RuntimeError):
    """Client and store speak different versions of the session protocol."""

    client: str  #: its version of raystore, and of the protocol
    store: str  #: likewise
    _message = "The client is {client} and the store is {store}: install the same raystore on both sides."


class AgentNotPicklableError(_Facts, TypeError):
    """The agent cannot be sent to runner actors."""

    agent: str
    why: str
    _message = (
        "Agent {agent} cannot be pickled, so no runner was started: {why}. Create what cannot be pickled "
        "(clients, locks, open files) inside the agent, or in setup() of an agent class."
    )


class AgentProcessError(_Facts, RuntimeError):
    """No process could be made for an agent (`isolation="process"`)."""

    why: str
    _message = "An agent's process could not be made: {why}"


class PoolStartError(_Facts, RuntimeError):
    """The runners of a pool did not start: they could not be made or scheduled in time, or their agent is slow."""

    asked: str  #: runners and resources that the pool asks for
    available: str  #: resources of the cluster
    why: str | None = None  #: cause, if a runner could not be made; None if time ran out
    setting_up: int = 0  #: runners that have started, and whose agent is not ready

    def __str__(self) -> str:
        asked, available, why, setting_up = self.args
        if why is not None:
            return f"A runner could not be made: {why}. Asked for: {asked}. The cluster has: {available}."
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


class PoolFailedError(_Facts, RuntimeError):
    """A call waits for work that only one pool would do, and the runners of that pool fail before they are ready."""

    pool_id: str
    failures: int  #: in a row
    queues: list[str]  #: that only this pool works for
    why: str  #: cause of the last failure

    def __str__(self) -> str:
        return (
            f"Nobody works for the queues {quoted(self.queues)}: pool {self.pool_id} has failed {self.failures} times "
            f"to make a runner, the last time with: {self.why}. It goes on trying, less and less often; what waits "
            "in its queues stays there. Mend the cause, or start a pool that works"
        )


# -- feeds -------------------------------------------------------------------------------------------------------------


class FeedNotFoundError(_Facts, LookupError):
    """No feed has this name: it was never opened in this store, or its consumer was forgotten."""

    feed: str
    _message = "There is no feed {feed!r} in this store: it begins with the first restore, publish or batches"


class FeedHeldError(_Facts, RuntimeError):
    """Something else draws the items of this feed: another `store.feed` of its name, here or in another process."""

    feed: str
    holder: str  #: whose it is
    silent_seconds: float | None = None  #: since another session that holds it has spoken; None if this process does
    _message = (
        "Feed {feed!r} is held by {holder}, and only one at a time may draw its items. Close that one first "
        "(await feed.close(), or the end of its process), or take another name."
    )


class FeedClosedError(_Facts, RuntimeError):
    """A feed gives no more batches: it was closed, or a function of its user's failed (the cause of this error)."""

    feed: str
    why: str
    _message = "Feed {feed!r} has ended: {why}. Make it anew with store.feed(...): it goes on where it was."


class DatasetChangedError(_Facts, ValueError):
    """A dataset is not the one that this feed began with; nothing was changed."""

    feed: str
    stream: str  #: name of the dataset; empty for all datasets of a feed without a mix
    before: int | None  #: how many items it had; None if that is not known, or if it was not there
    now: int | None  #: how many it has now

    def __str__(self) -> str:
        which = f"dataset {self.stream!r}" if self.stream else "the dataset"
        items = ["no known number of" if count is None else f"{count:,}" for count in (self.before, self.now)]
        differs = f"it had {items[0]} items and has {items[1]}" if self.before != self.now else "its items differ"
        return (
            f"Feed {self.feed!r} does not go on, since {which} has changed: {differs}. Pass the dataset of before; or "
            "changed='continue', which goes on at the old position in the new one (items may come twice or never); or "
            "take another name for the feed, which begins at the first item."
        )


class FailureBudgetError(_Facts, RuntimeError):
    """More rollouts of a feed failed than its budget allows, so that it is paused."""

    feed: str
    why: str
    errors: list[Any]  #: of the commonest: its text, how many rollouts had it, and the id of the newest of these

    def __str__(self) -> str:
        listed = "; ".join(f"{count} x {text!r} (as {rollout_id})" for text, count, rollout_id in self.errors[:NAMED])
        return (
            f"Feed {self.feed!r} is paused: {self.why}. The commonest errors: {listed or 'none is known'}. Mend the "
            "cause and say feed.resume(), or give the feed another budget=rs.FailureBudget(...)"
        )


class FilteredTooManyError(_Facts, RuntimeError):
    """So many groups in a row were filtered that a feed is paused: nothing would ever be trained on."""

    feed: str
    number: int  #: of groups that were filtered in a row
    bound: int  #: how many may be (`max_filtered`)
    why: str | None  #: the last one was
    _message = (
        "Feed {feed!r} is paused: {number} groups in a row were filtered, and max_filtered is {bound}. The last one: "
        "{why}. The policy may have nothing to learn from these items (all solved, or none), or keep= asks for too "
        "much. Say feed.resume() to go on, and raise max_filtered= if that is as it should be."
    )


# -- journals ----------------------------------------------------------------------------------------------------------


class JournalError(StoreError):
    """The root of errors of a journal."""


class JournalDamagedError(_Facts, JournalError, ValueError):
    """A part of a journal cannot be read; nothing of the journal was changed."""

    where: str  #: path of the file
    offset: int  #: in bytes
    why: str
    _message = (
        "The journal is damaged in {where} at byte {offset}: {why}. The store does not start, since what follows "
        "would be built on a gap. Restore the file from a copy, or start in another directory."
    )


class JournalFormatError(_Facts, JournalError, ValueError):
    """A journal was written by a newer raystore."""

    where: str  #: path of the file
    theirs: int  #: format of the journal
    ours: int  #: newest format that this raystore reads
    _message = (
        "{where} is of journal format {theirs}, and this raystore reads up to format {ours}: install a newer one."
    )


class JournalMissingError(_Facts, JournalError, LookupError):
    """A journal that should be there is not."""

    path: str
    why: str
    _message = (
        "There is no journal in {path}: {why}. The store does not start empty in its place; mount the directory "
        "that the run was written to, or start a new run with resume='never' in an empty one."
    )


class JournalInUseError(_Facts, JournalError, ValueError):
    """A journal belongs to another run, or to a store that is running."""

    path: str
    why: str
    _message = "The journal in {path} is not to be used like this: {why}."


class JournalFullError(_Facts, JournalError, OSError):
    """The disk of the journal is full. Nothing was changed, and reads go on; changes do once there is space again."""

    path: str
    retry_after_seconds: float
    _message = (
        "The disk of the journal in {path} is full, so the store takes no changes; nothing was changed. Free some "
        "space: the store goes on by itself. Try again in {retry_after_seconds:g} s."
    )


class JournalFailedError(_Facts, JournalError, OSError):
    """The disk of the journal failed: what was not acknowledged may be lost, and nothing more is acknowledged."""

    path: str
    why: str
    _message = "The journal in {path} could not be written ({why}), so the store has ended; start it again to go on."


class ReadOnlyError(_Facts, RuntimeError):
    """A run that was recovered for reading takes no changes."""

    path: str
    _message = (
        "The run in {path} was opened for reading. To go on with it, start a store there: "
        "rs.start(name, journal=...) or rs.InMemoryLightningStore(journal=...)."
    )


class JournalHeldError(ReadOnlyError):
    """A record of the journal ends every process that reads it; the store serves what was before that record."""

    record: int  #: number of the record
    deaths: int  #: processes in a row that it ended
    _message = (
        "Record {record} of the journal in {path} ended {deaths} processes in a row that read it, so the store "
        "goes no further: it serves what was before that record, and takes no changes. The process may have run "
        "out of memory, or raystore has a fault; the logs of those processes say more. resume='must' tries again."
    )


class FencedError(_Facts, JournalError, RuntimeError):
    """Another process writes this journal now."""

    path: str
    epoch: int  #: of this writer; the newer one has a higher
    _message = (
        "The journal in {path} has a newer writer than epoch {epoch}, so this store has ended. Use the newer one."
    )


# -- what an agent may raise -------------------------------------------------------------------------------------------


class Abort(Exception):
    """Raised by an agent: the infrastructure failed (a sandbox, an endpoint); the rollout is delivered again."""


class Drop(Exception):
    """Raised by an agent: this rollout is to be neither retried nor trained on."""


# -- errors as records -------------------------------------------------------------------------------------------------

#: Errors that a record may name; a peer may have made up any other name.
BY_NAME: dict[str, type[Exception]] = {name: globals()[name] for name in __all__ if name.endswith("Error")} | {
    cls.__name__: cls for cls in (AssertionError, LookupError, RuntimeError, TypeError, ValueError)
}

_PLAIN = (str, int, float, bool, type(None), list)


def to_record(error: Exception) -> tuple[str, list[Any]]:
    """The class name and plain positional arguments of an error."""
    if type(error).__name__ not in BY_NAME:
        return "StoreError", [f"{type(error).__name__}: {error}"]
    return type(error).__name__, [arg if isinstance(arg, _PLAIN) else repr(arg) for arg in error.args]


def from_record(name: str, args: list[Any]) -> Exception:
    """The error that a record stands for."""
    return BY_NAME.get(name, StoreError)(*args)


def copy_of(error: Exception) -> Exception:
    """The same error as a new object: one that is raised more than once would gather the tracebacks of all."""
    return type(error)(*error.args)
