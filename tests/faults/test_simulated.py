"""Rows 5 to 7 of the fault suite, simulated; and that the simulation would find what it is there to find.

A failing seed is run again by `python -m tests.faults.test_simulated SEED`.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from raystore.core.state import Step
from raystore.journal.recorder import Recorder
from raystore.journal.replay import Replay
from tests.faults import simulation
from tests.faults.simulation import SimulatedWriter, simulate

NOTHING = dict.fromkeys(
    ["lost", "doubled", "unexpected", "disordered", "orphaned", "replay differs", "snapshot differs"], 0
)


def run(seeds: Iterable[int], **how: Any) -> Any:
    """The sum of the counts, the number of kills, and the first seed that failed."""
    total, kills, failed = dict(NOTHING), 0, None
    for seed in seeds:
        counts, killed = simulate(seed, **how)
        total = {name: total[name] + counts[name] for name in total}
        kills += killed
        if failed is None and any(counts.values()):
            failed = seed
    return total, kills, failed


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("row", "what", "how"), [
    (5, "simulated faults", {}),
    (6, "every call may come twice", {"loss": 0.0, "twice": 1.0, "crashes": 0.0}),
    (7, "calls reordered and lost", {"loss": 0.3, "crashes": 0.0}),
])  # fmt: skip
def test_nothing_is_lost_or_done_twice(
    report: Callable[..., None],
    amount: Callable[[int, int], int],
    row: int,
    what: str,
    how: dict[Any, Any] | dict[str, float],
) -> None:
    """Whatever the way and the disk do to it."""
    seeds = range(1_000_000 * row, 1_000_000 * row + amount(20, 4_000 if row == 5 else 1_000))
    total, kills, failed = run(seeds, **how)
    did = f"{len(seeds)} seeds of 3 clients and 40 operations each, {kills} kills"
    report(row, what, figure=total, bar="0 of each", met=total == NOTHING, seed=failed or seeds.start, did=did)
    assert (kills > len(seeds)) == (row == 5)


def acknowledge_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers leave before what they say is on disk."""
    monkeypatch.setattr(SimulatedWriter, "when_durable", lambda log, number, told: False)


def forget_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that comes again runs again."""

    def again(state: Any, session: Any, kept: Any, operations: Any, run: Any) -> list[Any]:
        return [run(n, kept.first_ticket + n, *o) for n, o in enumerate(operations)]

    monkeypatch.setattr("raystore.remote.server_session.repeat", again)


def look_for_no_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that has been replaced goes on acknowledging."""
    before = SimulatedWriter.commit

    def commit(log: Any, upto: Any) -> None:
        if log.is_newest:
            return before(log, upto)
        waiting, log._waiting = log._waiting, []
        for _, told in waiting:
            told(None)

    monkeypatch.setattr(SimulatedWriter, "commit", commit)


def lose_what_was_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that says it has what it has not."""
    monkeypatch.setattr(simulation.Disk, "crash", lambda disk, lots: disk.records.__delitem__(slice(-2, None)))


def record_no_acknowledgements(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change without a record."""
    before = Recorder.change
    monkeypatch.setattr(
        Recorder, "change", lambda pen, kind, *rest: None if kind == "acknowledge" else before(pen, kind, *rest)
    )


def record_no_hand_overs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work given to calls that wait, without a record."""
    before = Recorder.change
    monkeypatch.setattr(
        Recorder, "change", lambda pen, kind, *rest: None if kind == "hand_over" else before(pen, kind, *rest)
    )


def record_no_ends_of_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are gone, without a record."""
    before = Recorder.change
    monkeypatch.setattr(
        Recorder, "change", lambda pen, kind, *rest: None if kind == "end_session" else before(pen, kind, *rest)
    )


def lose_patience_without_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """What time brings, without a record: suspects that waited for long enough."""
    before = Recorder.change
    monkeypatch.setattr(
        Recorder, "change", lambda pen, kind, *rest: None if kind == "advance" else before(pen, kind, *rest)
    )


def mint_other_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay that does not use the seeds that were recorded."""
    before = Replay._step

    def step(replay: Any, head: Any) -> Step:
        made = before(replay, head)
        made.seed += 1
        return made

    monkeypatch.setattr(Replay, "_step", step)


def count_one_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """The record of a batch says that less of it ran."""
    before = Recorder.flush

    def close(pen: Any) -> None:
        if pen._source is not None and pen._source.unwritten > 1:
            pen._source.unwritten -= 1
        before(pen)

    monkeypatch.setattr(Recorder, "flush", close)


def take_other_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay with a clock of its own."""
    before = Replay._step
    monkeypatch.setattr(Replay, "_step", lambda replay, head: before(replay, head._replace(now=head.now + 1)))


def forget_what_was_handed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that goes on does not know what parked calls were handed, so that nobody holds it."""
    monkeypatch.setattr("raystore.remote.server_session.handed_again", lambda state, session, keys: [])


BROKEN = [
    acknowledge_early, forget_answers, look_for_no_successor, lose_what_was_committed, record_no_acknowledgements,
    record_no_hand_overs, record_no_ends_of_sessions, lose_patience_without_a_record, mint_other_ids,
    count_one_less, take_other_time, forget_what_was_handed,
]  # fmt: skip


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda breaks: breaks.__name__)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_store_that_is_broken_is_found_out(monkeypatch: pytest.MonkeyPatch, breaks: Callable[..., None]) -> None:
    """Each of these, within a hundred seeds."""
    breaks(monkeypatch)
    for seed in range(100):
        try:
            counts, _ = simulate(seed)
        except AssertionError:  # an answer that cannot be, or a replay that came out otherwise: found as well
            return
        except KeyError as error:  # a call that is parked twice, of a batch that ran twice, breaks the bookkeeping
            assert breaks is forget_answers and traceback.extract_tb(error.__traceback__)[-1].name == "_remove"
            return
        if any(counts.values()):
            return
    pytest.fail("a hundred seeds saw nothing wrong")


if __name__ == "__main__":
    print(simulate(int(sys.argv[1])))  # noqa: T201
