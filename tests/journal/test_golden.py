"""Journals of earlier releases: what was written then is read as it was meant, and goes on by the rules of today."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

import raystore as rs
from raystore.core.snapshot import digest
from raystore.journal import format
from raystore.journal.files import RECORDS, SNAPSHOT, Directory
from raystore.journal.opening import read_run

GOLDEN = Path(__file__).parent / "golden"
JOURNALS = sorted(GOLDEN.glob("format-*/*.tar.gz"))


@pytest.fixture(params=JOURNALS, ids=lambda path: f"{path.parent.name}/{path.name.removesuffix('.tar.gz')}")
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A journal as it was written, and the facts of its store."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    path = tmp_path / request.param.name.removesuffix(".tar.gz")
    told = json.loads((path / "facts.json").read_text())
    (path / "facts.json").unlink()
    return path, told


def facts(state: Any) -> dict[str, Any]:
    """What a state is, in the words in which the facts were written."""
    return {
        "rollouts": {rollout_id: _rollout(state, entry) for rollout_id, entry in state.entries.items()},
        "queue": sorted([i, line[0], order[0], order[1]] for i, line, order in state.queues.orders()),
        "workers": sorted(
            [w.worker_id, w.status, w.current_rollout_id, w.current_attempt_id] for w in state.workers.values()
        ),
        "consumers": {name: _consumer(known) for name, known in state.consumers.items()},
        "resources": [
            [r.resources_id, r.version, r.policy_version, r.resources is None] for r in state.resources.everything()
        ],
        "latest": [state.resources.latest_id, state.resources.policy_version],
        "sessions": {
            name: [session.ended_at is not None, sorted(map(list, session.claims)), sorted(map(list, session.held))]
            for name, session in state.sessions.items()
        },
        "completions": [rollout_id for _, rollout_id in state.completions.after(None)],
        "changes": [[change.kind, change.rollout_id, change.attempt_id] for change in state.changes],
    }


def _rollout(state: Any, entry: Any) -> list[Any]:
    r = entry.rollout
    attempts = [
        [
            a.attempt_id, a.sequence_id, a.status, a.outcome, a.worker_id, a.resources_version, a.policy_version,
            a.reward, a.error, a.last_heartbeat_time,
        ]
        for a in entry.attempts
    ]  # fmt: skip
    taken = sorted([name, t.batch, t.step, t.note, t.is_durable] for name, t in entry.taken.items())
    spans = sorted([span.attempt_id, span.sequence_id, span.span_id] for span in state.spans.of(r.rollout_id))
    return [
        r.status, r.end_time, r.mode, r.resources_id, r.group_id, r.queue, r.priority, sorted(r.tags.items()),
        r.reward, entry.order and list(entry.order), entry.released, entry.suspect, entry.deliveries, attempts,
        sorted(entry.holders.items()), taken, spans,
    ]  # fmt: skip


def _consumer(known: Any) -> list[Any]:
    is_open = [known.open] if known.open is not None else []
    return [
        list(known.returned), known.made, is_open, sorted([k, v] for k, v in known.batches.items()),
        sorted([k, v] for k, v in known.steps.items()), known.checkpoint,
    ]  # fmt: skip


def formats(directory: Directory) -> set[int]:
    """The formats of the files of a journal."""
    paths = [path for kind in (RECORDS, SNAPSHOT) for *_, path in directory.segments(kind)]
    return {format.unpack_head(path.read_bytes()[: format.HEAD_BYTES], str(path))[0].format for path in paths}


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def first_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> list[Any]:
    """Where two stores differ first."""
    for section in theirs:
        one, other = ours[section], theirs[section]
        if one != other and isinstance(other, dict):
            return [
                (section, key, one.get(key), other.get(key))
                for key in {**one, **other}
                if one.get(key) != other.get(key)
            ][:1]
        if one != other:
            return [(section, a, b) for a, b in zip(one, other, strict=False) if a != b][:1] or [(section, one, other)]
    return []


def test_a_journal_is_read_by_the_rules_of_its_format(golden: Any) -> None:
    """Every rollout, attempt, batch and session is what it was, whatever the rules are today."""
    path, told = golden
    found = read_run(path)
    assert first_difference(plain(facts(found.state)), told) == []
    assert found.differences == []


def test_a_store_goes_on_with_a_journal_of_any_format(golden: Any) -> None:
    """From then on all of it is of today's format, and what another process finds there is the same."""
    path, told = golden
    directory = Directory(path)
    is_earlier = formats(directory) != {format.FORMAT}
    store = rs.InMemoryLightningStore(journal=path, resume="must", clock="manual")
    assert formats(directory) == {format.FORMAT}
    assert len(directory.segments(SNAPSHOT)) == 1 or not is_earlier
    before = {rollout.rollout_id for rollout in store.sync.query_rollouts()}
    assert before == set(told["rollouts"])
    for rollout_id in before:
        spans = store._service.with_bodies(store._service.state.spans.of(rollout_id))
        assert [type(span.body) for span in spans] == [bytes] * len(told["rollouts"][rollout_id][-1])
    store.sync.enqueue_rollout("goes on")
    while (claimed := store.sync.dequeue_rollout("w", queues=["default", "other"])) is not None:
        store.sync.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status="succeeded")
    store.sync.check()
    store.close()
    again = read_run(path)
    assert digest(again.state) == digest(store._service.state)
    assert again.differences == []


def test_a_newer_format_is_refused_by_name(golden: Any) -> None:
    """What a later release wrote is not guessed at."""
    path, _ = golden
    store = rs.InMemoryLightningStore(journal=path, resume="must", clock="manual")
    store.close()
    *_, newest = Directory(path).segments()[-1]
    data = newest.read_bytes()
    newest.write_bytes(data.replace(b"journal %d " % format.FORMAT, b"journal %d " % (format.FORMAT + 1), 1))
    with pytest.raises(rs.JournalFormatError, match=f"format {format.FORMAT + 1}"):
        read_run(path)
