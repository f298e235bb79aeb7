"""What can be asked of the state: one table from verb to function.

A verb takes the state, a step, and plain keyword arguments; it answers with records or plain values. `VERBS` says of
each whether it changes the state, which rollouts it names, what its caller may have to wait for, and whether its answer
hands something over that the caller must acknowledge. A verb never blocks: it answers None if its caller must wait.
To add a verb: write its function in the file of its noun, enter it in `VERBS`, and add a method to `raystore.api` and
`client.client`.
Not here: verbs about the store's process (`service.service.PROCESS_VERBS`) and about a session
(`remote.server_session.OWN`), calls that wait (`service.parking`), the batches in which operations come (`batches`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from raystore.core import (
    attempts,
    claims,
    evaluations,
    expiry,
    fates,
    feeds,
    groups,
    pauses,
    publishing,
    retention,
    retries,
    rollouts,
    training,
    workers,
)
from raystore.core.schema import Part, Schema, checker
from raystore.core.state import Chain, HandedKey, Session, State, Step
from raystore.errors import InvalidValueError, SessionEndedError, StoreError, copy_of

WaitsFor = Literal["work", "batch", "rollouts", "completions", "changes", "feed", "evaluation"]


@dataclass(slots=True, eq=False)
class Verb:
    """One entry of a table of verbs."""

    run: Callable[..., Any]
    changes: bool = True
    names: tuple[str, ...] = ()  #: the arguments that name rollouts
    #: The keys of what an answer hands over, by arguments and answer: its caller must acknowledge them.
    hands: Callable[[dict[str, Any], Any], list[HandedKey]] | None = None
    waits_for: WaitsFor | None = None  #: if the answer is None, the call is parked until there is some of this
    serves: str = ""  #: the argument that names the queues whose work the caller asks for
    fits: Callable[[Any], bool] = field(init=False)  #: whether arguments are what the function's annotations ask for
    schema: Schema = field(init=False)

    def __post_init__(self) -> None:
        self.schema = Schema(self.run)
        self.fits = self.schema.fits

    def require(self, verb: str, arguments: dict[str, Any]) -> None:
        """Raise `InvalidValueError` unless the arguments fit the verb: wrong ones must not fail inside the core."""
        if not self.fits(arguments):
            raise self.schema.refusal(verb, arguments)

    def rollouts_named(self, arguments: dict[str, Any]) -> list[str]:
        """The rollouts that a call names. Their deadlines are applied before it runs, even if it is then refused."""
        named: list[str] = []
        for name in self.names:
            value = arguments.get(name)
            if isinstance(value, str):
                named.append(value)
            elif isinstance(value, (list, tuple)):
                named.extend(item for item in value if isinstance(item, str))
        return named


CHAINS_KEPT = 64  #: bulk calls of a session of which the last part has not come

#: whether something says of an operation which part of a bulk call it is
is_part: Callable[[Any], bool] = checker(Part)


def run(state: State, step: Step, verb: str, arguments: dict[str, Any]) -> Any:
    """Run one verb, if these are arguments of it."""
    spec = VERBS.get(verb)
    if spec is None or not spec.fits(arguments):
        raise refusal(step, spec, verb, arguments)
    if step.session is not None and step.session.ended_at is not None:  # by an operation before it in the same batch
        raise SessionEndedError(step.session.session_id)
    return perform(state, step, spec, arguments)


def refusal(step: Step, spec: Verb | None, verb: str, arguments: dict[str, Any]) -> InvalidValueError:
    """Why these are no arguments of a verb; the other parts of a bulk call are refused alike."""
    if spec is None:
        return InvalidValueError("operation", verb, "a verb of this store")
    error = spec.schema.refusal(verb, arguments)
    if is_chained(spec, arguments) and step.session is not None:
        _part(step.session, arguments["chain"], refuse=error)
    return error


def is_chained(spec: Verb, arguments: dict[str, Any]) -> bool:
    """Whether an operation is a part of a bulk call, whatever else it says."""
    return is_part(arguments.get("chain")) and "chain" in spec.schema.names


def perform(state: State, step: Step, spec: Verb, arguments: dict[str, Any]) -> Any:
    """Run a verb with arguments that fit, for a session that has not ended.

    An argument `chain` (an id, and whether this is the last part) ties the parts of one bulk call together: once a
    part was refused, later parts are refused alike without being tried.
    """
    if arguments.get("chain") is None:
        answer = spec.run(state, step, **arguments)
    else:
        assert step.session is not None
        chain = _part(step.session, arguments["chain"])
        try:
            answer = spec.run(state, step, **(arguments | {"chain": chain}))
        except StoreError as error:
            chain.refusal = error
            chain.notes.clear()
            raise
    if state.moved_members or state.moved_feeds:
        feeds.settle(state, step)
    return answer


def _end_chain(state: State, step: Step, *, chain_id: int) -> bool:
    """Drop a bulk call whose caller was gone before its last part left. Returns whether a part had come."""
    assert step.session is not None
    return step.session.chains.pop(chain_id, None) is not None


def _part(session: Session, given: tuple[int, bool], refuse: StoreError | None = None) -> Chain:
    """The chain that a part belongs to, which ends with its last part; raises what refused an earlier part."""
    chain_id, is_last = given
    chain = session.chains.setdefault(chain_id, Chain())
    chain.is_last = is_last
    if is_last:
        del session.chains[chain_id]
    elif len(session.chains) > CHAINS_KEPT:
        del session.chains[next(iter(session.chains))]
    if refuse is not None:
        chain.refusal = chain.refusal or refuse
        chain.notes.clear()
    elif chain.refusal is not None:
        raise copy_of(chain.refusal)
    return chain


def _batch_of(arguments: dict[str, Any], taken: Any) -> list[HandedKey]:
    """The key of the batch that a take answered, if it is one."""
    number = taken[1] if taken else 0
    return [(arguments["consumer"], number)] if number else []


def handed_again(state: State, session: Session, keys: list[HandedKey]) -> Any:
    """What an answer handed over, as it is now; None if the session holds nothing of it any more."""
    for key in keys:
        if claims.is_batch(key):
            return training.batch_again(state, session, key)
    return claims.claimed_again(state, session, [key for key in keys if claims.is_claim(key)]) or None


_ONE = ("rollout_id",)
_LIST = ("rollout_ids",)

VERBS: dict[str, Verb] = {
    "start_rollout": Verb(attempts.start_rollout),
    "enqueue": Verb(rollouts.enqueue),
    "dequeue": Verb(claims.dequeue, hands=claims.keys_of, waits_for="work", serves="queues"),
    "query_rollouts": Verb(rollouts.query, changes=False, names=("rollout_id_in",)),
    "get_rollout": Verb(rollouts.get, changes=False, names=_ONE),
    "update_rollout": Verb(rollouts.update, names=_ONE),
    "wait": Verb(rollouts.wait, changes=False, waits_for="rollouts"),
    "sort_out": Verb(rollouts.sort_out, changes=False),
    "completed": Verb(rollouts.completed, changes=False, waits_for="completions"),
    "changes": Verb(rollouts.changes, changes=False, waits_for="changes"),
    "enqueue_groups": Verb(groups.enqueue),
    "get_group": Verb(groups.get, changes=False),
    "query_groups": Verb(groups.query, changes=False),
    "cancel_rollouts": Verb(groups.cancel_rollouts, names=_LIST),
    "requeue": Verb(retries.requeue, names=_LIST),
    "release": Verb(rollouts.release, names=_LIST),
    "delete_rollouts": Verb(retention.delete, names=_LIST),
    "pause_queues": Verb(pauses.pause),
    "resume_queues": Verb(pauses.resume),
    "limit_queue": Verb(pauses.limit),
    "start_attempt": Verb(attempts.start_attempt, names=_ONE),
    "query_attempts": Verb(attempts.query, changes=False, names=_ONE),
    "get_latest_attempt": Verb(attempts.latest, changes=False, names=_ONE),
    "update_attempt": Verb(attempts.update, names=_ONE),
    "heartbeat": Verb(attempts.heartbeat),
    "decline": Verb(claims.decline, names=_ONE),
    "acknowledge": Verb(claims.confirm),
    "add_spans": Verb(attempts.add_spans, names=_ONE),
    "save": Verb(attempts.save, names=_ONE),
    "get_saved": Verb(attempts.get_saved, changes=False, names=_ONE),
    "refresh": Verb(attempts.refresh, names=_ONE),
    "finish": Verb(attempts.finish, names=_ONE),
    "next_numbers": Verb(rollouts.next_numbers),
    "query_spans": Verb(rollouts.query_spans, changes=False, names=_ONE),
    "query_many_spans": Verb(rollouts.query_many_spans, changes=False, names=_LIST),
    "take": Verb(training.take, hands=_batch_of, waits_for="batch"),
    "take_groups": Verb(training.take_groups, hands=_batch_of, waits_for="batch"),
    "get_batch": Verb(training.get_batch, changes=False),
    "ack": Verb(training.ack),
    "nack": Verb(training.nack),
    "checkpoint": Verb(training.checkpoint),
    "rewind": Verb(feeds.rewind),
    "forget_consumer": Verb(feeds.forget),
    "ledger": Verb(training.ledger, changes=False),
    "open_feed": Verb(feeds.open_feed),
    "feed_work": Verb(feeds.work, changes=False, waits_for="feed"),
    "feed_add": Verb(feeds.add),
    "feed_judge": Verb(feeds.judge),
    "feed_choose": Verb(feeds.choose),
    "publish_feed": Verb(feeds.publish),
    "feed_items": Verb(feeds.items_of, changes=False),
    "feed_status": Verb(feeds.status, changes=False),
    "selection": Verb(fates.selection, changes=False),
    "resume_feed": Verb(feeds.resume),
    "close_feed": Verb(feeds.close_feed),
    "begin_evaluation": Verb(evaluations.begin),
    "evaluation_add": Verb(evaluations.add),
    "evaluation_result": Verb(evaluations.result, changes=False, waits_for="evaluation"),
    "evaluations": Verb(evaluations.query, changes=False),
    "drop_evaluation": Verb(evaluations.drop),
    "put_resources": Verb(publishing.put),
    "get_resources": Verb(publishing.get, changes=False),
    "get_latest_resources": Verb(publishing.latest, changes=False),
    "query_resources": Verb(publishing.query, changes=False),
    "delete_resources": Verb(publishing.delete),
    "hold_objects": Verb(publishing.hold_objects),
    "unread": Verb(publishing.unread, names=_ONE),
    "update_worker": Verb(workers.update),
    "query_workers": Verb(workers.query, changes=False),
    "get_worker": Verb(workers.get, changes=False),
    "report_session": Verb(claims.report_session),
    "end_chain": Verb(_end_chain),
}


#: How to find the keys of what an answer hands over, by verb; the caller must acknowledge them.
HANDING = {name: verb.hands for name, verb in VERBS.items() if verb.hands}
CHANGING = frozenset(name for name, verb in VERBS.items() if verb.changes)  #: must not run twice


# -- changes that no caller asks for -----------------------------------------------------------------------------------


def advance(state: State, step: Step, *due: list[Any], **rules: Callable[..., Any]) -> None:
    """Work off what was due; by other `rules` in an earlier format."""
    expiry.advance(state, step, expiry.Due(*due), **rules)


def hand_over(
    state: State,
    step: Step,
    session_id: str,
    ticket: int,
    queues: list[str],
    limit: int,
    worker_id: str | None,
    claim: Callable[..., list[claims.Claimed]] = claims.claim,
) -> list[claims.Claimed]:
    """Give work to a parked call. That there is none is not recorded again: it was recorded when the call came."""
    session = state.sessions[session_id]
    step.session = session
    claimed = claim(state, step, queues=queues, limit=limit, worker_id=worker_id, note_empty=False)
    if claimed:
        session.replies.hand(ticket, claims.keys_of({}, claimed), session.claims, session.batches)
    return claimed


def _hand_batch(state: State, step: Step, session_id: str, ticket: int, consumer: str, count: int) -> training.Batch:
    """Give a call that waits for a batch what there is."""
    session = step.session = state.sessions[session_id]
    batch = training.take_now(state, step, consumer, count)
    if batch[1]:
        session.replies.hand(ticket, [(consumer, batch[1])], session.claims, session.batches)
    return batch


def take_back(
    state: State, step: Step, session_id: str, keys: list[HandedKey], undo: Callable[..., Any] = claims.take_back
) -> None:
    """The caller of a parked call had gone when its answer came."""
    for key in keys:
        undo(state, step, state.sessions[session_id], key, why="declined")


def _acknowledge(state: State, step: Step, session_id: str, keys: list[HandedKey]) -> list[HandedKey]:
    return claims.acknowledge(state, step, state.sessions[session_id], keys)


def end_session(
    state: State, step: Step, session_id: str, why: str, end: Callable[..., None] = claims.end_session
) -> None:
    """A client process has ended."""
    end(state, step, state.sessions[session_id], why=why)


def _with_groups(change: Callable[..., Any]) -> Callable[..., Any]:
    """A change, after which groups and feeds follow what has become of rollouts and batches."""

    def run(state: State, step: Step, *arguments: Any) -> Any:
        done = change(state, step, *arguments)
        if state.moved_members or state.moved_feeds:
            feeds.settle(state, step)
        return done

    return run


#: Changes that no caller asks for: deadlines, work for parked calls, sessions that begin or end. The keys are the names
#: that a journal uses. The service decides when a step runs, and with which arguments; a replay runs the recorded ones.
STEPS: dict[str, Callable[..., Any]] = {
    "pause": expiry.pause,
    "advance": _with_groups(advance),
    "hand_over": _with_groups(hand_over),
    "hand_batch": _with_groups(_hand_batch),
    "take_back": _with_groups(take_back),
    "acknowledge": _with_groups(_acknowledge),
    "open_session": claims.open_session,
    "end_session": _with_groups(end_session),
    "hold_back": _with_groups(publishing.hold_back),
    "forget_workers": workers.forget,
}
