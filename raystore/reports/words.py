"""Numbers as people read them."""

from __future__ import annotations


def figure(value: float | None) -> str:
    """A reward or a mean, with as many digits as say something."""
    return "" if value is None else f"{value:.4g}"


def share(part: float, whole: float) -> str:
    """A share in per cent; empty of nothing."""
    if not whole:
        return ""
    return "below 1%" if 0 < part < whole / 200 else f"{part / whole:.0%}"


def counted(number: int, noun: str, nouns: str | None = None) -> str:
    """A number with its noun: 1 rollout, 2 rollouts."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"
