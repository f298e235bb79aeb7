"""What a training step was like, as one flat mapping of names to floats, for trackers.

The names are those that verl's users know, where verl has one; `docs/metrics.md` lists them. What is not known (tokens
of spans that nobody read, a reward that no rollout has) is left out.
Not here: when a step is told, and to whom (`client.feed`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, pstdev
from time import monotonic
from typing import Any

from raystore.types.evaluations import EvaluationResult, EvaluationScore
from raystore.types.feeds import FeedGroup, FeedStatus
from raystore.values.plain import scalar

TOLD = ("filtered", "failed", "stale")  #: endings of groups whose share of a step is told


def endings(status: FeedStatus) -> Counter[str]:
    """How many items of a feed have ended how."""
    found: Counter[str] = Counter()
    for stream in status.streams.values():
        found.update(stream.endings)
    return found


class StepClock:
    """What has passed since the last step.

    Attributes:
        waited: seconds for which the trainer has waited for batches.
    """

    def __init__(self) -> None:
        self.waited: float = 0.0
        self._since: float | None = None
        self._before: Counter[str] | None = None

    def begin(self, status: FeedStatus) -> bool:
        """The trainer begins to ask for batches; whether it had not before."""
        if self._since is not None:
            return False
        self._since, self._before = monotonic(), endings(status)
        return True

    def metrics(
        self, groups: Sequence[FeedGroup], step: int, judged: Sequence[float], status: FeedStatus
    ) -> dict[str, float]:
        """The metrics of a step that has consumed these groups; the next step begins.

        `judged` are the rewards of the groups that were judged since the last step, whether they passed or not.
        """
        self.begin(status)  # if it was not asked for batches
        assert self._since is not None and self._before is not None
        now, after = monotonic(), endings(status)
        seconds = now - self._since
        ended = {name: after[name] - self._before[name] for name in TOLD}
        total = len(groups) + sum(ended.values())
        found: dict[str, Any] = {
            "training/global_step": step,
            "training/epoch": max((group.epoch for group in groups), default=None),
            **_of_rewards(groups, judged),
            "groups/trained": len(groups),
            **{f"groups/{name}_fraction": ended[name] / total if total else 0.0 for name in TOLD},
            **_stats("lag", [group.lag.total for group in groups], ("mean", "max")),
            **_speed(groups, seconds),
            "timing_s/step": seconds,
            "timing_s/wait": self.waited,
        }
        self._since, self._before, self.waited = now, after, 0.0
        return {name: float(value) for name, value in found.items() if value is not None}


def _of_rewards(groups: Sequence[FeedGroup], judged: Sequence[float]) -> dict[str, Any]:
    rewards = [reward for group in groups for reward in group.rewards if reward is not None]
    found = _stats("critic/rewards", rewards, ("mean", "std", "min", "max"))
    found["critic/rewards/mean_unfiltered"] = fmean(judged) if judged else found.get("critic/rewards/mean")
    environments = sorted({group.environment for group in groups})
    for name in environments if len(environments) > 1 else ():
        of_one = [reward for group in groups if group.environment == name for reward in group.rewards]
        found |= _stats(f"env/{name}/rewards", [reward for reward in of_one if reward is not None], ("mean",))
    return found


def _speed(groups: Sequence[FeedGroup], seconds: float) -> dict[str, Any]:
    rollouts = sum(len(group.train) for group in groups)
    counts = [group.tokens for group in groups if group.tokens is not None]
    tokens = sum(counts) if counts and len(counts) == len(groups) else None
    return {
        "rollouts/trained": rollouts,
        "perf/rollouts_per_second": rollouts / seconds if seconds else None,
        "perf/total_num_tokens": tokens,
        "perf/throughput": tokens / seconds if tokens is not None and seconds else None,
    }


def of_evaluations(results: Iterable[EvaluationResult]) -> dict[str, float]:
    """What evaluations came to; of several of a name the newest version."""
    found: dict[str, float] = {}
    for one in results:
        start = f"eval/{one.name}"
        whole = one.items * one.samples
        found |= _of_score(start, one.overall) | {f"{start}/failed_fraction": one.overall.failed / whole}
        if one.version is not None:
            found[f"{start}/version"] = float(one.version)
        for environment, score in one.environments.items() if len(one.environments) > 1 else ():
            found |= _of_score(f"{start}/{environment}", score)
    return found


def _of_score(start: str, score: EvaluationScore) -> dict[str, float]:
    found = {f"{start}/pass@{k}": chance for k, chance in score.pass_at.items()}
    if score.mean is not None:
        found[f"{start}/reward_mean"] = score.mean
    if score.confidence is not None:
        found[f"{start}/reward_low"], found[f"{start}/reward_high"] = score.confidence
    return found


_STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {"mean": fmean, "std": pstdev, "min": min, "max": max}


def _stats(name: str, values: Sequence[float], which: Iterable[str]) -> dict[str, Any]:
    finite = [value for value in values if math.isfinite(value)]
    return {f"{name}/{one}": _STATISTICS[one](finite) for one in which} if finite else {}


def flat(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers among a user's own metrics; those of a mapping within have its name and "/" before their own."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
        elif isinstance(number := scalar(value), (int, float)):
            found[f"{prefix}{name}"] = float(number)
    return found
