"""What keeps work from going on: the kinds of constraints, and a finding of one in words.

`KINDS` has every kind once, with what it means and the next thing to do; docs/why.md is written from it. A finding says
with numbers and ids what was found. Its text never holds a control character, whoever the words are from.
Not here: which constraints there are at the moment, and which of them binds (`service.diagnosis`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

TEXT_LENGTH = 300  #: characters of an error, or of another text of a user's, that a finding shows


class Finding(NamedTuple):
    """One thing that keeps work from going on, or may soon."""

    kind: str  #: one of `KINDS`
    text: str  #: a sentence with the evidence
    remedy: str  #: the next thing to do
    evidence: dict[str, Any]  #: plain values: ids, counts, seconds


class Kind(NamedTuple):
    """What findings of one kind have in common."""

    meaning: str
    remedy: str  #: with names of evidence in braces


#: All kinds. Of two that hold the same work up, the one that stands first here is named first.
KINDS: dict[str, Kind] = {
    "store_failed": Kind(
        "The store takes no changes any more.",
        "Read the log of the store's process, and start the store again: with its journal it goes on where it was.",
    ),
    "journal_full": Kind(
        "The disk of the journal is full, so that no change is accepted.",
        "Free some space on the disk of {path}: the store goes on by itself.",
    ),
    "journal_slow": Kind(
        "The journal waits for its disk, and answers wait for the journal.",
        "Put the journal on a faster disk, or start the store with durability='process'.",
    ),
    "memory_full": Kind(
        "Memory is full of what must stay, so that no work is handed out.",
        "Let consumers take, ack and checkpoint what is theirs, say forget_consumer() of one that will not come again "
        "and release() of what nobody needs, or start the store with journal=..., which keeps spans on disk.",
    ),
    "budget_spent": Kind(
        "Too many rollouts of a feed have failed, so that it is paused.",
        "Mend the cause and say `await feed.resume()`, or give the feed another budget=rs.FailureBudget(...).",
    ),
    "filtered_too_many": Kind(
        "Too many groups of a feed were filtered in a row, so that it gives no batch.",
        "Look whether keep= asks too much, or the items teach nothing any more; `await feed.resume()` lets it go on.",
    ),
    "paused": Kind(
        "Somebody has paused a queue, or all of them.",
        "Say store.resume(): it ends kept pauses and those of its own process, and with others=True all.",
    ),
    "evaluation_share": Kind(
        "Rollouts of an evaluation wait, since evaluations have their share of what runs while other work waits.",
        "Nothing, if training matters more; else give the evaluation a larger eval_share=, or the store more runners.",
    ),
    "evaluation_version_gone": Kind(
        "An evaluation waits for the version of the policy that it is pinned to, which cannot be had.",
        "Publish that version again, as a trainer does that starts again, or drop the evaluation: "
        "store.drop_evaluation({evaluation!r}).",
    ),
    "limit_reached": Kind(
        "As much of a queue or a feed runs, or has started within a minute, as its limit allows.",
        "Raise the limit if more may run: store.limit_queue(...) of a queue, max_running= of a feed.",
    ),
    "pool_failed": Kind(
        "The runners of a pool fail before they are ready, and nobody else serves its queues.",
        "Mend the cause of the error: the pool goes on trying. Or start a pool that works.",
    ),
    "unserved_queue": Kind(
        "Rollouts wait in a queue, and no process that lives has asked for work of it.",
        "Serve it with RunnerPool(store, agent, queues=[{queue!r}]), or cancel_rollouts() what was put there in error.",
    ),
    "resources_gone": Kind(
        "Resources cannot be had any more, and what waits for them is held back.",
        "Publish {resources_id!r} again, from a process that lives as long as the run or with a journal.",
    ),
    "not_published": Kind(
        "A feed hands out nothing before its first publish, nor after a restore before the next one.",
        "Say `await feed.publish(weights, version=step)` of feed {consumer!r}.",
    ),
    "runners_silent": Kind(
        "A claim was not acknowledged, so that processes that ask for work must first show that they live.",
        "Wait some seconds; if it stays so, look whether the event loops of the runners are blocked.",
    ),
    "runners_rest": Kind(
        "All runners that are known rest, since preempt= says that their nodes go away.",
        "Wait for other nodes, or for these to stay; or look whether the function preempt= is right.",
    ),
    "suspect_waits": Kind(
        "A rollout was lost with its process; to show whether it is to blame, it waits for one that runs nothing else.",
        "Wait: after suspect_patience_seconds anybody may take it. Look into `story` for what it was lost with.",
    ),
    "backing_off": Kind(
        "An attempt ended badly, and the delay of a retry rule is not over.",
        "Mend what the attempts failed of; update_rollout(id, status='queuing') ends a delay at once.",
    ),
    "runners_busy": Kind(
        "Rollouts wait in a queue that is served, and no runner is free.",
        "Start more runners, or let each run more at once: RunnerPool(size=, concurrency=).",
    ),
    "no_pump": Kind(
        "Nobody draws the items of a feed.",
        "Start the trainer again: store.feed({consumer!r}, ...) goes on where the feed is.",
    ),
    "not_drawn": Kind(
        "A feed has free places, and its process draws no items.",
        "Look what reading the dataset waits for, or whether the event loop of that process is blocked.",
    ),
    "batch_left": Kind(
        "A process that held a batch has ended; the batch comes again to whoever takes next.",
        "Start the trainer again; it takes this batch first.",
    ),
    "admission_closed": Kind(
        "A feed draws nothing more until its trainer is done with a batch: the trainer is the bottleneck.",
        "Make the training step quicker, or raise max_lag= if more lag is acceptable.",
    ),
    "not_judged": Kind(
        "Complete groups wait for the feed's own process: it reads their spans, and calls keep= and order=.",
        "Look whether the event loop of that process is blocked; make these functions quicker.",
    ),
    "group_waits": Kind(
        "A group is not complete: it waits for some of its rollouts.",
        "If that rollout hangs, cancel_rollouts([its id]); bound such waits by timeout_seconds= of a rollout, or by "
        "deadline_seconds= and min_size= of a group.",
    ),
    "rollout_runs": Kind(
        "A rollout is at work.",
        "Wait; if it hangs, cancel_rollouts([{rollout_id!r}]), and set timeout_seconds= for the next ones.",
    ),
    "all_claimed": Kind(
        "Nothing is left in the queues: all that is unfinished runs.",
        "Wait, and enqueue more if runners are idle; if the oldest hangs, cancel_rollouts([{rollout_id!r}]).",
    ),
    "batch_held": Kind(
        "A consumer waits for nothing: it has a batch, which it has not acknowledged.",
        "Say ack() of it when its step is done, or nack() if it is not to be trained on.",
    ),
    "batch_ready": Kind(
        "A consumer waits for nothing: there is something for it to take.",
        "Take it: the trainer has not asked for it yet.",
    ),
    "feed_over": Kind(
        "A feed has given out all its items.",
        "Give the feed more epochs= or more data, or end the run.",
    ),
    "nothing_fits": Kind(
        "Nothing that waits or runs is what a consumer asks for.",
        "Compare what it takes with what is enqueued; after forget_consumer({consumer!r}) it may ask for other things.",
    ),
    "rollout_finished": Kind(
        "A rollout has ended.",
        "See its story; requeue([{rollout_id!r}]) runs again what has failed or was cancelled.",
    ),
    "group_ended": Kind(
        "A group is not open any more.",
        "See store.story({group_id!r}) for what became of its members.",
    ),
    "no_tasks": Kind(
        "Nothing is queued, and nothing runs.",
        "Enqueue work: store.enqueue_rollout(...), store.enqueue_group(...) or a feed.",
    ),
    "pool_fails": Kind(
        "The runners of a pool fail before they are ready; others serve its queues.",
        "Mend the cause of the error: the pool goes on trying.",
    ),
    "budget_low": Kind(
        "At least 80 % of the failure budget of a feed is spent.",
        "Look at the commonest errors before the feed pauses.",
    ),
    "filtered_many": Kind(
        "At least 80 % of the groups that may be filtered in a row were.",
        "Look whether keep= asks for too much, or the items teach nothing any more, before the feed pauses.",
    ),
    "read_only": Kind(
        "The run was opened for reading, as its journal has it: time stands still, and who asks for work is not known.",
        "To go on with it, start a store there: rs.start(name, journal={path!r}).",
    ),
}  # fmt: skip

RANK: dict[str, int] = {kind: number for number, kind in enumerate(KINDS)}


def found(kind: str, text: str, **evidence: Any) -> Finding:
    """A finding of a kind, with that kind's remedy."""
    return finding(KINDS[kind], kind, text, evidence)


def finding(of: Kind, kind: str, text: str, evidence: Mapping[str, Any]) -> Finding:
    """A finding of a kind that need not be in `KINDS`."""
    shown = {name: _plain(value) for name, value in evidence.items()}
    ends = "" if text.endswith((".", "?")) else "."
    return Finding(kind, plain(text) + ends, of.remedy.format(**shown), shown)


def _plain(value: Any) -> Any:
    return plain(value) if isinstance(value, str) else value


def plain(text: str) -> str:
    """A text in one line, in which characters that would do something to a terminal are spelt out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def brief(text: str | None) -> str:
    """The last line of an error, or of another text of a user's, as far as a sentence has room for it."""
    lines = (text or "").strip().splitlines()
    return short(lines[-1].strip()) if lines else "no text"


def short(text: str) -> str:
    """A text of a user's as far as a sentence has room for it."""
    shown = plain(text[: TEXT_LENGTH + 1])
    return shown if len(shown) <= TEXT_LENGTH else f"{shown[:TEXT_LENGTH]}..."


def lasting(seconds: float) -> str:
    """A duration as people read it."""
    if seconds < 0.95:
        return f"{max(seconds, 0.0):.2f} s"
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6_000:
        return f"{seconds:.0f} s"
    return f"{seconds / 3_600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def counted(number: int, one: str, many: str = "") -> str:
    """A number of things, with the word in the right form."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
