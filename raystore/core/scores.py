"""The statistics of an evaluation: means, their confidence, and pass@k, of items that were sampled several times.

The items of a benchmark are drawn independently of each other; the samples of one item are not, since they share its
difficulty. So an interval is that of a mean of items, each with the mean of its samples (standard errors clustered by
item, as in Miller, "Adding Error Bars to Evals", 2024), by Student's t with as many degrees of freedom as there are
items but one. pass@k is the unbiased estimator of Chen et al., "Evaluating Large Language Models Trained on Code",
2021.
Pure functions of numbers, the same on every machine: sums are rounded once.
Not here: which samples count, and as what (`evaluations`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, sqrt
from typing import NamedTuple

#: The 97.5 % quantiles of Student's t, by degrees of freedom from 1.
_T = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
_Z = 1.959963984540054  #: that of the normal distribution


class Sampled(NamedTuple):
    """What the samples of one item came to: how many there are, passed and failed, and the sum of their rewards."""

    samples: int
    passed: int
    failed: int
    total: float


class Estimate(NamedTuple):
    """A mean of items with its 95 % interval, which is not known of a single item."""

    value: float
    low: float | None
    high: float | None


class Score(NamedTuple):
    """What some items came to."""

    items: int
    samples: int
    passed: int
    failed: int
    mean: Estimate | None  #: of rewards; None if there is no sample
    pass_at: dict[int, Estimate]  #: by k


def quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: exact to four digits."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z, v = _Z, freedom  # the first terms of the expansion of Cornish and Fisher
    return z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v * v)


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of independent values with its 95 % interval; None if there are none."""
    count = len(values)
    if not count:
        return None
    mean = fsum(values) / count
    if count == 1:
        return Estimate(mean, None, None)
    error = sqrt(fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    width = quantile(count - 1) * error
    return Estimate(mean, mean - width, mean + width)


def pass_at(samples: int, passed: int, k: int) -> float:
    """The chance that one of `k` samples passes, if `passed` of `samples` did: 1 - C(n - c, k) / C(n, k).

    As a product, which is exact where the binomials would not fit into a float. `k` is at most `samples`.
    """
    missed = samples - passed
    if missed < k:
        return 1.0
    chance = 1.0
    for number in range(k):
        chance *= (missed - number) / (samples - number)
    return 1.0 - chance


def powers(samples: int) -> list[int]:
    """The k for which pass@k is told: 1, 2, 4, and so on, and the number of samples."""
    found = [1]
    while found[-1] * 2 <= samples:
        found.append(found[-1] * 2)
    return found if found[-1] == samples else [*found, samples]


def score(items: Sequence[Sampled], samples: int) -> Score:
    """What these items came to, of which each is to have so many samples.

    An item without a sample so far is in no mean, one with fewer than k is in no pass@k.
    """
    sampled = [item for item in items if item.samples]
    chances: dict[int, Estimate] = {}
    for k in powers(samples):
        found = estimate([pass_at(item.samples, item.passed, k) for item in sampled if item.samples >= k])
        if found is not None:
            chances[k] = _within(found)
    return Score(
        items=len(items),
        samples=sum(item.samples for item in sampled),
        passed=sum(item.passed for item in sampled),
        failed=sum(item.failed for item in sampled),
        mean=estimate([item.total / item.samples for item in sampled]),
        pass_at=chances,
    )


def _within(chance: Estimate) -> Estimate:
    """The estimate of a chance: its interval ends at 0 and 1."""
    if chance.low is None or chance.high is None:
        return chance
    return Estimate(chance.value, max(chance.low, 0.0), min(chance.high, 1.0))
