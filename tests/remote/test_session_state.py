"""What a client's session decides, without Ray, threads and clocks: batches, repeats, parked calls, claims."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest

import raystore as rs
from raystore.core.resources import FREED
from raystore.core.verbs import HANDING
from raystore.errors import to_record
from raystore.remote import session_state
from raystore.remote.session_state import Actions, Batch, Listen, Operation, SessionState
from raystore.wire import frames

CLIENT = (7, "test")
DEQUEUE = {"queues": ["default"], "limit": 1, "worker_id": None}
CLAIM = [[["r"], ["r", "a"], False]]  # rows, as far as a session looks at them


class Loop:
    """What a state looks at of an event loop."""

    def __init__(self, *, closed: bool = False, running: bool = True) -> None:
        self.closed, self.running = closed, running

    def is_closed(self) -> bool:
        return self.closed

    def is_running(self) -> bool:
        return self.running


class Peer:
    """A session's state, and a store that answers what it is told to."""

    def __init__(self, epoch: int = 1) -> None:
        self.ids, self.hints = map(str, itertools.count()), itertools.count(1)
        self.now = 100.0
        self.state = SessionState(
            "s", epoch, CLIENT, None, self.now, make_id=lambda: next(self.ids), jitter=lambda: 1.0
        )

    def post(self, verb: str, arguments: dict[str, Any] | None = None, loop: Any = None) -> Operation:
        """Take an operation whose caller is a thread, or a loop."""
        operation = made(verb, arguments or {}, self.now)
        operation.loop = loop
        self.state.post(operation)
        return operation

    def batch(self, **more: Any) -> Batch:
        """The batch that leaves now."""
        batch = self.state.next_batch(self.now, **more)
        assert batch is not None
        return batch

    def reply(
        self,
        batch: Batch,
        *replies: list[Any],
        later: Iterable[Any] = (),
        wanted: bool = False,
        epoch: int | None = None,
    ) -> Actions:
        """A batch is answered."""
        rest = [list(replies), list(later), [], [next(self.hints), wanted]]
        return self.state.reply(batch, epoch or self.state.epoch, frames.DONE, rest, self.now)

    def park(self, verb: str = "dequeue", **more: Any) -> Operation:
        """Have an operation parked."""
        operation = self.post(verb, DEQUEUE | {"timeout": 60.0}, **more)
        self.reply(self.batch(), [frames.PARKED])
        return operation

    def claim(self, **more: Any) -> Operation:
        """Have a claim arrive, whose caller has not run yet."""
        operation = self.post("dequeue", DEQUEUE | {"timeout": 0.0}, **more)
        self.reply(self.batch(), [frames.VALUE, CLAIM])
        return operation


def made(verb: str, arguments: dict[str, Any], now: float) -> Operation:
    """An operation, as a session makes it."""
    packed = frames.pack_operation(verb, arguments)
    waits = arguments if "timeout" in arguments else None
    return Operation(verb, arguments=waits, packed=packed, issued=now, hands=HANDING.get(verb))


def parts(batch: Batch) -> list[bytes]:
    """A batch as it travels."""
    return frames.join(batch.header, [operation.packed for operation in batch.operations])


def answers_in(actions: Actions) -> list[tuple[Operation, Any, Exception | None]]:
    """The answers that are there: of which operation, and the value or error."""
    return [(operation, operation.answer, operation.error) for operation in actions.answered]


def told(batch: Batch | None) -> list[tuple[str, dict[str, Any]]]:
    """The operations of a batch, as they travel."""
    return [] if batch is None else [tuple(one) for one in frames.split(parts(batch), None)[1:]]


def acknowledged(batch: Batch) -> list[Any]:
    """The claims that a batch acknowledges."""
    return list(frames.split(parts(batch), None)[0][7])


@pytest.fixture
def peer() -> Peer:
    return Peer()


# -- batches -----------------------------------------------------------------------------------------------------------


def test_operations_leave_together_and_in_order(peer: Peer) -> None:
    """One batch is under way; what is posted meanwhile leaves behind it, with what it says of answers."""
    peer.post("a")
    peer.post("b")
    first = peer.batch()
    peer.post("c")
    assert peer.state.next_batch(peer.now) is None
    answers = answers_in(peer.reply(first, [frames.VALUE, 1], [frames.ERROR, *to_record(rs.StoreClosedError("s"))]))
    assert [(op.verb, value, type(error)) for op, value, error in answers] == [
        ("a", 1, type(None)),
        ("b", None, rs.StoreClosedError),
    ]
    second = peer.batch()
    assert [verb for verb, _ in told(first)] == ["a", "b"] and [verb for verb, _ in told(second)] == ["c"]
    assert first.header == [7, "test", "0", 1, 0, [], 1, [], [], None]
    assert second.header == [7, "test", "0", 2, 1, [], 3, [], []]


def test_more_batches_leave_beside_the_first_if_it_is_worth_it(peer: Peer) -> None:
    """The free places of the window share what waits, and none is left for a fourth batch."""
    peer.post("a")
    peer.batch()
    for _ in range(4 * session_state.WORTH_OPERATIONS):
        peer.post("b")
    assert [len(peer.batch().operations) for _ in range(2)] == [2 * session_state.WORTH_OPERATIONS] * 2
    assert peer.state.next_batch(peer.now, is_needed=True) is None


def test_an_operation_that_was_abandoned_before_it_left_does_not_leave(peer: Peer) -> None:
    """A gap in the tickets ends a batch, since the store counts them up from the first."""
    peer.post("a")
    dropped = peer.post("b")
    peer.post("c")
    assert not peer.state.abandon(dropped, peer.now)  # the store need not hear of it
    first = peer.batch()
    assert [verb for verb, _ in told(first)] == ["a"]
    peer.reply(first, [frames.VALUE, None])
    assert [verb for verb, _ in told(peer.batch())] == ["c"]


def test_a_loop_asks_for_a_batch_once(peer: Peer) -> None:
    """However much it posts until it has asked; one that has ended is forgotten."""
    loop, ended = Loop(), Loop(closed=True)

    def must_ask(loop: Loop) -> bool:
        operation = made("a", {}, peer.now)
        operation.loop = loop  # type: ignore[assignment]
        return peer.state.post(operation)

    assert [must_ask(loop), must_ask(loop), must_ask(ended), must_ask(ended)] == [True, False, True, False]
    peer.state.due(peer.now)
    assert [must_ask(loop), must_ask(ended)] == [False, True]
    peer.batch(loop=loop)
    assert must_ask(loop)


def test_a_loop_that_was_woken_sends_behind_its_callers(peer: Peer) -> None:
    """What waits for another loop, or a thread, leaves at once."""
    woken, other = Loop(), Loop()
    peer.post("a", loop=woken)
    assert peer.state.next_batch(peer.now, awake=[woken]) is None
    assert told(peer.state.next_batch(peer.now, awake=[other]))


def test_what_no_loop_sends_the_timer_sends(peer: Peer) -> None:
    """A loop that is blocked holds nothing up for longer than a moment."""
    peer.post("a", loop=Loop())
    due = peer.state.due(peer.now)
    assert due.batches == [] and due.at == pytest.approx(peer.now + session_state.PENDING_SECONDS)
    peer.now += session_state.PENDING_SECONDS
    assert [told(batch) for batch in peer.state.due(peer.now).batches] == [[("a", {})]]


# -- batches without an answer -----------------------------------------------------------------------------------------


def test_a_batch_without_an_answer_is_sent_again_under_its_number(peer: Peer) -> None:
    """With pauses that double up to a bound; then a write has an unknown outcome, and a read fails."""
    peer.post("next_numbers", {"rollout_ids": ["r"]})
    peer.post("get_latest_resources")
    batch, pauses = peer.batch(), []
    answers: Any = ()
    while not answers:
        answers = answers_in(peer.state.no_answer(batch, "lost", peer.now))
        before = peer.now
        while not answers and not (due := peer.state.due(peer.now)).batches:
            assert due.at is not None
            peer.now = due.at + 1e-6
        if not answers:
            assert due.batches == [batch]
            pauses.append(round(peer.now - before, 1))
    assert pauses[:6] == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0] and 60 < sum(pauses) < 64
    assert [type(error) for _, _, error in answers] == [rs.OutcomeUnknownError, rs.StoreUnavailableError]
    assert str(answers[0][2]).endswith("no answer for 60 s. lost")
    assert peer.state.session_id == "1"  # the batch left a gap


def test_an_answer_of_a_session_that_was_renewed_is_not_taken(peer: Peer) -> None:
    """Its operations were sent again; that the old batch fails says nothing of them."""
    write = peer.post("next_numbers", {"rollout_ids": ["r"]})
    old = peer.batch()
    peer.state.reply(old, 1, frames.ENDED, [], peer.now)
    new = peer.batch()
    assert new.operations == [write] and (new.session_id, new.sequence) == ("1", 1)
    assert peer.reply(old, [frames.VALUE, [9]]) == Actions()
    assert peer.state.no_answer(old, "lost", peer.now + 100) == Actions()
    assert [value for _, value, _ in answers_in(peer.reply(new, [frames.VALUE, [1]]))] == [[1]]


def test_a_write_that_was_sent_twice_into_an_ended_session_has_an_unknown_outcome(peer: Peer) -> None:
    """It may have run the first time; a read simply runs again."""
    peer.post("next_numbers", {"rollout_ids": ["r"]})
    read = peer.post("get_latest_resources")
    batch = peer.batch()
    peer.state.no_answer(batch, "lost", peer.now)
    answers = answers_in(peer.state.reply(batch, 1, frames.ENDED, [], peer.now))
    assert [(op.verb, type(error)) for op, _, error in answers] == [("next_numbers", rs.OutcomeUnknownError)]
    assert peer.batch().operations == [read]


def test_an_answer_of_an_older_process_is_none(peer: Peer) -> None:
    """It was replaced and does not know it: the batch is sent again."""
    peer.state.epoch = 2
    peer.post("next_numbers", {"rollout_ids": ["r"]})
    batch = peer.batch()
    assert peer.reply(batch, [frames.VALUE, [99]], epoch=1) == Actions()
    assert peer.state.due(peer.now + 1).batches == [batch]


def test_a_store_that_takes_nothing_for_now(peer: Peer) -> None:
    """Its refusal is the answer of the batch, and what follows asks anew; any other refusal is the end."""
    overloaded = rs.OverloadedError(9, 9, 5.0)
    for error, is_end in ((overloaded, False), (rs.JournalFailedError("j", "why"), True)):
        peer.post("a")
        refusal = [to_record(error)]
        answers = answers_in(peer.state.reply(peer.batch(), 1, frames.BROKEN, refusal, peer.now))
        assert [type(found) for _, _, found in answers] == [type(error)]
        assert (peer.state.failure is not None) is is_end
    with pytest.raises(rs.JournalFailedError):
        peer.post("a")


# -- parked calls ------------------------------------------------------------------------------------------------------


def test_an_answer_may_overtake_the_word_that_its_call_is_parked(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies of two batches come in either order."""
    monkeypatch.setattr(session_state, "WORTH_OPERATIONS", 1)
    waiting = peer.post("wait", {"timeout": 5.0})
    slow = peer.batch()
    peer.post("tick")
    quick = peer.batch()
    later = [[waiting.ticket, [frames.VALUE, []]]]
    assert [op.verb for op, _, _ in answers_in(peer.reply(quick, [frames.VALUE, None], later=later))] == ["tick"]
    assert [value for _, value, _ in answers_in(peer.reply(slow, [frames.PARKED]))] == [[]]


def test_a_listen_call_is_parked_while_something_is_parked(peer: Peer) -> None:
    """One at a time; it says what was received, and an answer that comes again is not given twice."""
    operation = peer.post("wait", {"timeout": 60.0})
    listen = peer.reply(peer.batch(), [frames.PARKED]).listen
    assert listen == Listen("0", [], 1)
    later = [[operation.ticket, [frames.VALUE, []]]]
    actions = peer.state.listened(listen, 1, frames.DONE, [later, [9, False]], peer.now)
    assert [op for op, _, _ in answers_in(actions)] == [operation]
    assert actions.listen == ("0", [operation.ticket], 1)
    actions = peer.state.listened(actions.listen, 1, frames.DONE, [later, [10, False]], peer.now)
    assert not answers_in(actions) and actions.listen is not None


def test_a_listen_call_without_an_answer_is_parked_again_in_a_moment(peer: Peer) -> None:
    """What was received is said again."""
    operation = peer.park("wait")
    due = peer.state.due(peer.now)
    assert due.listen is None  # it is parked since the answer came
    listen = session_state.Listen("0", [operation.ticket], 1)
    peer.state.not_listened(listen, peer.now)
    due = peer.state.due(peer.now)
    assert due.listen is None and due.at is not None and due.at <= peer.now + session_state.LISTEN_RETRY_SECONDS
    assert peer.state.due(peer.now + session_state.LISTEN_RETRY_SECONDS).listen == listen


def test_what_an_old_session_received_does_not_enter_the_new_one(peer: Peer) -> None:
    """A listen call that fails after the session was renewed: tickets and notices count anew there."""
    notice = [-1, [frames.NOTICE, "cancelled", "r", "a"]]
    listen = peer.reply(_posted(peer), [frames.VALUE, 1], later=[notice], wanted=True).listen
    assert listen is not None and listen.received == [-1]
    peer.state.renew(1, peer.now)
    peer.state.not_listened(listen, peer.now)
    assert _posted(peer).header[2:9] == ["1", 1, 0, [], 2, [], []]


def test_notices_are_handed_on_once(peer: Peer) -> None:
    """They come again until the store has heard that they were received; what is freed is let go."""
    peer.state.held.hold(("p", 3), ("reference",))
    notice, freed = [-1, [frames.NOTICE, "cancelled", "r", "a"]], [-2, [frames.NOTICE, FREED, "p", "3"]]
    assert peer.reply(_posted(peer), [frames.VALUE, 1], later=[notice]).notices == [["cancelled", "r", "a"]]
    assert peer.reply(_posted(peer), [frames.VALUE, 1], later=[notice, freed]).notices == []
    assert len(peer.state.held) == 0


@pytest.mark.parametrize("end", ["closing", "failed"])
def test_a_wait_that_is_given_up_while_its_session_ends(peer: Peer, end: str) -> None:
    """The word that it is parked comes although nothing can be told any more: no error, and nothing is left."""
    operation = peer.post("dequeue", DEQUEUE | {"timeout": 60.0})
    batch = peer.batch()
    peer.state.abandon(operation, peer.now)
    if end == "closing":
        peer.state.is_closing = True
    else:
        assert [op for op, _, _ in answers_in(peer.state.fail(rs.StoreUnavailableError("s", "test")))] == [operation]
    assert not answers_in(peer.reply(batch, [frames.PARKED]))
    assert not peer.state.has_pending
    peer.state.abandon(operation, peer.now)
    assert not peer.state.has_pending


def test_a_wait_that_is_given_up_is_cancelled(peer: Peer) -> None:
    """An answer that crosses the cancelling is given back; afterwards nothing is left of it."""
    operation = peer.park()
    peer.state.abandon(operation, peer.now)
    cancelling = peer.batch()
    assert told(cancelling) == [("cancel_wait", {"of": operation.ticket})]
    peer.reply(cancelling, [frames.VALUE, False], later=[[operation.ticket, [frames.VALUE, CLAIM]]])
    declining = peer.batch()
    assert told(declining) == [("decline", {"rollout_id": "r", "attempt_id": "a"})]
    peer.reply(declining, [frames.VALUE, True])
    waiting = peer.park()
    peer.state.abandon(waiting, peer.now)
    peer.reply(peer.batch(), [frames.VALUE, True])
    assert peer.state.next_batch(peer.now) is None
    peer.state.not_listened(session_state.Listen("0", [], 1), peer.now)
    assert peer.state.due(peer.now + 1).listen is None  # nothing is parked


def test_calls_that_were_parked_in_another_process_are_sent_again(peer: Peer) -> None:
    """For what is left of their time, and asking first for what they may have been handed there."""
    claiming, waiting, abandoned = peer.park(), peer.park("wait"), peer.park("wait")
    ticket = claiming.ticket
    peer.state.abandon(abandoned, peer.now)
    peer.now += 20
    peer.reply(peer.batch(), [frames.PARKED], epoch=2)
    assert told(peer.batch()) == [
        ("dequeue", DEQUEUE | {"timeout": 40.0, "of": ticket}),
        ("wait", DEQUEUE | {"timeout": 40.0}),
    ]
    assert peer.state.epoch == 2 and waiting.ticket > ticket


def test_another_process_of_the_store_is_told_which_objects_are_here(peer: Peer) -> None:
    """It answers with those that nobody needs."""
    peer.state.held.hold(("p", 3), ("reference",))
    peer.reply(_posted(peer), [frames.VALUE, 1], epoch=2)
    holding = peer.batch()
    assert [op.verb for op in holding.operations] == ["hold_objects"]
    peer.reply(holding, [frames.VALUE, [["p", 3]]])
    assert len(peer.state.held) == 0


def test_objects_that_were_freed_before_they_were_held(peer: Peer) -> None:
    """The notice may overtake the answer to the call that published them."""
    peer.state.held.free([("p", "3")])
    peer.state.held.hold(("p", 3), ("reference",))
    assert len(peer.state.held) == 0


# -- claims ------------------------------------------------------------------------------------------------------------


def test_a_claim_is_acknowledged_once_its_caller_runs(peer: Peer) -> None:
    """With the next batch, or after half a second with one of its own."""
    peer.claim()
    peer.post("a")
    batch = peer.batch()
    assert acknowledged(batch) == []
    peer.reply(batch, [frames.VALUE, None])
    peer.state.seen([("r", "a")], peer.now)
    assert peer.state.due(peer.now).batches == []
    (batch,) = peer.state.due(peer.now + session_state.ACKNOWLEDGE_SECONDS).batches
    assert acknowledged(batch) == [["r", "a"]] and batch.operations == []


def test_a_claim_of_a_busy_caller_is_acknowledged_for_it(peer: Peer) -> None:
    """Only once, and not if its loop does not run."""
    busy = Loop(running=False)
    peer.claim(loop=busy)
    peer.now += session_state.ACKNOWLEDGE_SECONDS
    assert peer.state.due(peer.now).batches == []
    busy.running = True
    (batch,) = peer.state.due(peer.now).batches
    assert acknowledged(batch) == [["r", "a"]]
    peer.reply(batch)
    peer.now += 60
    assert peer.state.due(peer.now).batches == []


def test_a_claim_whose_caller_is_gone_is_given_back(peer: Peer) -> None:
    """Its loop has ended, or the caller was cancelled."""
    loop = Loop()
    peer.claim(loop=loop)
    loop.closed = True
    peer.state.due(peer.now)
    declining = peer.batch()
    peer.reply(declining, [frames.VALUE, True])
    peer.state.abandon(peer.claim(), peer.now)
    for batch in (declining, peer.batch()):
        assert told(batch) == [("decline", {"rollout_id": "r", "attempt_id": "a"})] and acknowledged(batch) == []


# -- silence and the end -----------------------------------------------------------------------------------------------


def test_a_session_is_kept_alive_while_no_listen_call_can_be_parked(peer: Peer) -> None:
    """Silence would cost this process something while it holds work, or waits."""
    peer.park()
    assert peer.state.due(peer.now + 60).batches == []  # the listen call tells that it is there
    peer.now += 60
    peer.state.not_listened(session_state.Listen("0", [], 1), peer.now)
    (batch,) = peer.state.due(peer.now).batches
    assert batch.operations == []


def test_a_session_that_closes_is_not_renewed(peer: Peer) -> None:
    """The store has let go of all that it held, which is what was wanted."""
    waiting = peer.park()
    peer.state.is_closing = True
    with pytest.raises(rs.StoreClosedError):
        peer.post("a")
    closing = peer.post("close_session")
    answers = answers_in(peer.state.reply(peer.batch(), 1, frames.ENDED, [], peer.now))
    assert {op for op, _, _ in answers} == {waiting, closing}
    assert isinstance(peer.state.failure, rs.StoreClosedError)


def _posted(peer: Peer) -> Batch:
    """A batch of one operation that means nothing here."""
    peer.post("a")
    return peer.batch()
