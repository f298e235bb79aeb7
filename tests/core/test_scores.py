"""The statistics of evaluations against exact values and brute force."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from math import comb, isclose, sqrt
from statistics import fmean, stdev

import pytest

from raystore.core.scores import Estimate, Sampled, estimate, pass_at, powers, quantile, score


@pytest.mark.parametrize("samples", range(1, 9))
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(samples: int) -> None:
    """Of all ways to draw k of the samples."""
    for passed in range(samples + 1):
        drawn = [True] * passed + [False] * (samples - passed)
        for k in range(1, samples + 1):
            subsets = [any(subset) for subset in combinations(drawn, k)]
            assert pass_at(samples, passed, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


@pytest.mark.parametrize(
    ("samples", "passed", "k"), [(200, 3, 100), (10_000, 1, 5_000), (1_000, 999, 1), (512, 0, 512)]
)
def test_pass_at_k_of_many_samples(samples: int, passed: int, k: int) -> None:
    """The binomials, taken exactly."""
    exact = 1 - Fraction(comb(samples - passed, k), comb(samples, k))
    assert isclose(pass_at(samples, passed, k), exact, rel_tol=1e-12, abs_tol=1e-12)


def test_pass_at_one_is_the_share_that_passed() -> None:
    """By its meaning."""
    assert pass_at(8, 3, 1) == pytest.approx(3 / 8) and pass_at(1, 1, 1) == 1.0 and pass_at(1, 0, 1) == 0.0


#: Degrees of freedom and the 97.5 % quantile of Student's t, from tables to five digits.
QUANTILES = [(1, 12.70620), (2, 4.30265), (5, 2.57058), (10, 2.22814), (30, 2.04227), (31, 2.03951), (40, 2.02108),
             (60, 2.00030), (120, 1.97993), (1_000, 1.96234), (10**6, 1.95997)]  # fmt: skip


@pytest.mark.parametrize(("freedom", "value"), QUANTILES)
def test_quantiles_are_those_of_tables(freedom: int, value: float) -> None:
    """To four digits."""
    assert quantile(freedom) == pytest.approx(value, abs=1e-4)


def test_an_interval_is_that_of_the_means_of_items() -> None:
    """Standard errors clustered by item: samples of one item that agree with each other are no further evidence."""
    values = [0.0, 1.0, 0.5, 0.5]
    found = estimate(values)
    assert found is not None and found.value == fmean(values)
    width = quantile(3) * stdev(values) / sqrt(4)
    assert found[1:] == pytest.approx((0.5 - width, 0.5 + width))
    few = score([Sampled(2, 2, 0, 2.0), Sampled(2, 0, 0, 0.0), Sampled(2, 1, 0, 1.0)], 2).mean
    many = score([Sampled(200, 200, 0, 200.0), Sampled(200, 0, 0, 0.0), Sampled(200, 100, 0, 100.0)], 200).mean
    assert few == many


def test_what_is_not_known_is_left_out() -> None:
    """No mean without a sample, no interval of one item, no pass@k of fewer than k samples."""
    assert estimate([]) is None and estimate([0.25]) == Estimate(0.25, None, None)
    nothing = score([Sampled(0, 0, 0, 0.0)], 4)
    assert nothing.mean is None and nothing.pass_at == {} and (nothing.items, nothing.samples) == (1, 0)
    partly = score([Sampled(3, 1, 0, 1.0), Sampled(1, 1, 0, 1.0)], 4)
    assert (
        partly.pass_at.keys() == {1, 2}
        and partly.pass_at[2].value == pytest.approx(2 / 3)
        and partly.pass_at[2].low is None
    )
    assert partly.pass_at[1].value == pytest.approx((1 / 3 + 1) / 2)


def test_the_interval_of_a_chance_ends_at_0_and_1() -> None:
    """Also where few items agree least."""
    found = score([Sampled(1, 1, 0, 1.0), Sampled(1, 0, 0, 0.0)], 1)
    assert found.pass_at[1] == Estimate(0.5, 0.0, 1.0) and found.mean is not None
    assert found.mean.low is not None and found.mean.low < 0  # a reward may be anything


def test_ks_are_powers_of_two_and_all_samples() -> None:
    """So that curves of different lengths share points."""
    assert [powers(n) for n in (1, 2, 3, 8, 10)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 10]]
