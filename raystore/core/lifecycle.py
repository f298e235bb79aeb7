"""The rules of status: the only file that knows what may follow what, and what a status or an outcome decides.

Three small machines. An attempt moves by *events* (`ATTEMPT`); its rollout then follows from the latest attempt
(`rollout_after`), and its worker too (`worker_after`). `update_rollout` may set any status by hand, as in the contract,
and so may `update_attempt`; these tables say what everything else does. A group moves by what becomes of its members
and of its batch (`GROUP`). The diagrams in the docs are drawn from the tables.
Not here: when a deadline has passed (`expiry`), where a rollout stands in line (`queues`), which member counts for its
group (`groups`).
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from raystore.core.records import Attempt, Config, RetryRule, Worker

RolloutStatus: TypeAlias = Literal["queuing", "preparing", "running", "failed", "succeeded", "cancelled", "requeuing"]
AttemptStatus: TypeAlias = Literal["preparing", "running", "failed", "succeeded", "unresponsive", "timeout"]
WorkerStatus: TypeAlias = Literal["idle", "busy", "unknown"]
#: Why an attempt ended, in more detail than its status.
Outcome: TypeAlias = Literal[
    "ok",
    "agent_error",  # the agent raised
    "infra",  # the agent raised `rs.Abort`, or it or its resources could not be loaded
    "runner_lost",  # the process that ran the agent died
    "withdrawn",  # given back unfinished, as by a runner that is stopped
    "timeout",
    "unresponsive",
    "cancelled",
    "superseded",  # another attempt was started by hand
    "dropped",  # the agent raised `rs.Drop`: the rollout is not to be trained on
]
#: Outcomes of which a rule may say how often the rollout is tried again.
RetryOutcome: TypeAlias = Literal["agent_error", "timeout", "unresponsive", "infra", "runner_lost"]
Trainable: TypeAlias = Literal["succeeded", "failed"]
GroupStatus: TypeAlias = Literal["open", "complete", "trained", "filtered", "stale", "failed", "cancelled"]

ROLLOUT_STATUSES: tuple[str, ...] = get_args(RolloutStatus)
ATTEMPT_STATUSES: tuple[str, ...] = get_args(AttemptStatus)
WORKER_STATUSES: tuple[str, ...] = get_args(WorkerStatus)
OUTCOMES: tuple[str, ...] = get_args(Outcome)
RETRY_OUTCOMES: tuple[str, ...] = get_args(RetryOutcome)
GROUP_STATUSES: tuple[str, ...] = get_args(GroupStatus)

QUEUED = frozenset({"queuing", "requeuing"})
ACTIVE = frozenset({"preparing", "running"})
FINISHED = frozenset({"failed", "succeeded", "cancelled"})
REQUEUABLE = FINISHED - {"succeeded"}  #: rollouts that `requeue` lets wait again
TRAINABLE: tuple[str, ...] = ("failed", "succeeded")  #: rollouts that a consumer may be given

# Statuses of an attempt:
SETTLED = frozenset({"failed", "succeeded", "unresponsive", "timeout"})  #: it has ended
OVER = SETTLED - {"unresponsive"}  #: ... and a span of a runner that only looked dead does not undo that
COMPLETED = frozenset({"failed", "succeeded"})  #: it has an end time, and its worker is free again
AT_WORK = "running"  #: another span changes neither the attempt nor its rollout, if both are so

#: Status and outcome of an attempt that somebody should be running.
LIVE = frozenset((status, None) for status in ACTIVE)

BUSY: WorkerStatus = "busy"  #: a worker that has an attempt

# Events that move an attempt.
SPAN = "span"  # a span arrived
HEARTBEAT = "heartbeat"  # its runner says that it is at work on it
TIMEOUT = "timeout"  # config.timeout_seconds since its start
SILENCE = "silence"  # config.unresponsive_seconds without a heartbeat
LOSS = "loss"  # the process that ran it has ended
WITHDRAWAL = "withdrawal"  # its runner was stopped, or could not read its resources, and gave it back
ABORT = "abort"  # the agent raised Abort: the infrastructure failed
DROP = "drop"  # the agent raised Drop: not worth training on
CANCEL = "cancel"  # the driver cancelled the rollout

#: (status, event) -> status. What is not listed stays as it is.
ATTEMPT: dict[tuple[str, str], str] = {
    ("preparing", SPAN): "running",  # the runner's first span
    ("preparing", HEARTBEAT): "running",  # the runner, whose agent may end its first span much later
    ("unresponsive", SPAN): "running",  # a runner that only looked dead
    ("preparing", TIMEOUT): "timeout",  # its deadline passed
    ("running", TIMEOUT): "timeout",  # its deadline passed
    ("preparing", SILENCE): "unresponsive",  # its deadline passed
    ("running", SILENCE): "unresponsive",  # its deadline passed
    ("preparing", LOSS): "unresponsive",  # the session ended: kill, exit, dead node
    ("running", LOSS): "unresponsive",  # the same, in mid-rollout
    ("preparing", WITHDRAWAL): "unresponsive",  # the job of its process ended
    ("running", WITHDRAWAL): "unresponsive",  # the same, in mid-rollout
    ("preparing", ABORT): "failed",  # agent
    ("running", ABORT): "failed",  # agent
    ("preparing", DROP): "failed",  # agent
    ("running", DROP): "failed",  # agent
    ("preparing", CANCEL): "failed",  # driver, before the agent did anything
    ("running", CANCEL): "failed",  # driver
}

#: Why an attempt ended, by the event that ended it.
OUTCOME_OF_EVENT = {
    TIMEOUT: "timeout",
    SILENCE: "unresponsive",
    LOSS: "runner_lost",
    WITHDRAWAL: "withdrawn",
    ABORT: "infra",
    DROP: "dropped",
    CANCEL: "cancelled",
}

#: Events that a runner reports by an outcome of its attempt. Any other outcome is only noted.
EVENT_OF_OUTCOME = {OUTCOME_OF_EVENT[event]: event for event in (ABORT, DROP, LOSS, WITHDRAWAL)}

#: Why an attempt ended, where `update_attempt` set the status without saying.
OUTCOME_OF_STATUS = {
    "preparing": None,
    "running": None,
    "succeeded": "ok",
    "failed": "agent_error",
    "timeout": "timeout",
    "unresponsive": "unresponsive",
}

#: rollout status -> status when a span made (or found) its latest attempt running.
ROLLOUT_ON_SPAN = {
    "preparing": "running",  # the first span
    "queuing": "running",  # re-queued by hand while its agent went on
    "requeuing": "running",  # an unresponsive runner came back: its retry is withdrawn
}

#: The same for a heartbeat. It does not bring back a rollout that waits for a retry: only a span shows work to save.
ROLLOUT_ON_HEARTBEAT = {"preparing": "running"}

#: Attempts that say nothing about the agent, so `max_attempts` does not count them.
UNCHARGED = frozenset({"runner_lost", "withdrawn", "infra"})

#: Outcomes of attempts that tell of the infrastructure: a group replaces a member that failed so.
INFRASTRUCTURE = frozenset({"runner_lost", "infra"})

# Statuses of a group:
OPEN = "open"  #: members may still succeed for it
READY = frozenset({"complete", "trained"})  #: it has what it needs, and consumers may be given it

# Events that move a group.
FILLED = "filled"  # a member has succeeded in each of its places
SHORT = "short"  # no more can be had, and at least min_size have succeeded
MISSED = "missed"  # no more can be had, and that is too few
REOPENED = "reopened"  # a member that had succeeded was run again by hand, or deleted
CONSUMED = "consumed"  # a step of a consumer's model has consumed it
UNDONE = "undone"  # the model is at an earlier step again
REJECTED = "rejected"  # its feed keeps only groups that pass a test
LATE = "late"  # it could only be trained after more batches than its feed allows

#: (status, event) -> status. What is not listed stays as it is.
GROUP: dict[tuple[str, str], str] = {
    ("open", FILLED): "complete",  # the last of its members that was needed
    ("open", SHORT): "complete",  # a member that nobody takes over, or the deadline
    ("open", MISSED): "failed",  # the same, with too few successes
    ("open", CANCEL): "cancelled",  # driver
    ("complete", REOPENED): "open",  # driver, by hand
    ("complete", MISSED): "failed",  # the same, of one that was short already
    ("open", LATE): "stale",  # feed: too many batches were trained since its first claim
    ("complete", LATE): "stale",  # the same, in the queue
    ("complete", REJECTED): "filtered",  # feed: keep
    ("complete", CONSUMED): "trained",  # trainer: ack
    ("trained", UNDONE): "complete",  # trainer: rewind
}


def group_after(status: str, event: str) -> str:
    """The status of a group after an event."""
    return GROUP.get((status, event), status)


def attempt_after(status: str, event: str, outcome: str | None = None) -> str:
    """The status of an attempt after an event; `outcome` is what it had before.

    A withdrawn attempt was given up by its runner, so a late span or heartbeat does not make it run again.
    """
    if outcome == "withdrawn" and event in (SPAN, HEARTBEAT):
        return status
    return ATTEMPT.get((status, event), status)


def rollout_after(
    attempt_status: str,
    outcome: str | None,
    config: Config,
    *,
    charged: int,
    deliveries_left: bool,
    retries_left: bool | None = None,
) -> str:
    """The status of a rollout whose latest attempt just took `attempt_status`.

    `charged` counts the attempts that `max_attempts` limits, this one included; for a store that is driven only by
    the contract's own calls it is the attempt's sequence number, which is what the reference compares.
    `retries_left` is what the rule for this outcome says, which goes before all else; None if there is no rule.
    """
    if attempt_status not in ATTEMPT_STATUSES:
        raise ValueError(f"Invalid attempt status: {attempt_status}")
    if attempt_status in ACTIVE or attempt_status == "succeeded":
        return attempt_status
    if outcome == "cancelled":
        return "cancelled"
    if outcome == "dropped":
        return "failed"
    if retries_left is not None:
        return "requeuing" if retries_left else "failed"
    if outcome in UNCHARGED:
        return "requeuing" if deliveries_left or outcome == "withdrawn" else "failed"
    if attempt_status in config.retry_condition and charged < config.max_attempts:
        return "requeuing"
    return "failed"


def rule_for(outcome: str | None, config: Config) -> RetryRule | None:
    """The rule for attempts with an outcome, if there is one."""
    return next((rule for rule in config.retry_rules if rule.outcome == outcome), None)


def follows_attempts(rollout_status: str) -> bool:
    """Whether a rollout still follows its latest attempt: what the driver has cancelled stays cancelled."""
    return rollout_status != "cancelled"


def worker_after(attempt_status: str) -> WorkerStatus:
    """The status of a worker whose attempt just took a status: unknown if nobody reported its end."""
    if attempt_status in ACTIVE:
        return BUSY
    return "idle" if attempt_status in COMPLETED else "unknown"


# -- what a record decides ---------------------------------------------------------------------------------------------


def is_live(attempt: Attempt) -> bool:
    """Whether somebody should be running an attempt; a superseded one only keeps its status."""
    return (attempt.status, attempt.outcome) in LIVE


def is_untouched(attempt: Attempt) -> bool:
    """Whether an attempt was started and nobody has worked on it, so that it can be taken back."""
    return attempt.status == "preparing" and attempt.last_heartbeat_time is None


def is_over(attempt: Attempt) -> bool:
    """Whether an attempt has ended for good: no sign of life brings it back."""
    return attempt.status in OVER or attempt.outcome == "withdrawn"


def is_dropped(attempt: Attempt | None) -> bool:
    """Whether the agent gave its task up, so that nobody trains on the rollout."""
    return attempt is not None and attempt.outcome == "dropped"


def is_cut_off(rollout_status: str, latest: Attempt) -> bool:
    """Whether a rollout would have run longer than its latest attempt has: somebody, or something, ended it."""
    return rollout_status != "succeeded" and latest.outcome not in ("ok", "agent_error", "dropped")


def is_possible(attempt: Attempt) -> bool:
    """Whether status and outcome go together: what was lost can only be unresponsive."""
    return attempt.outcome != "runner_lost" or attempt.status == "unresponsive"


def uses_delivery(event: str, *, is_charged: bool) -> bool:
    """Whether an event uses up one of the deliveries of a rollout: an abort, or a loss for which it is to blame."""
    return event == ABORT or (event == LOSS and is_charged)


def notice_of(rollout_status: str) -> str:
    """What the holder of a running attempt is told when its rollout is finished by hand."""
    return "cancelled" if rollout_status == "cancelled" else "superseded"


def is_busy(worker: Worker) -> bool:
    """Whether a worker has an attempt."""
    return worker.status == BUSY


def is_idle(worker: Worker) -> bool:
    """Whether a worker is known to have none."""
    return worker.status == "idle"
