"""The selection report: what a feed has trained on, compared with all that it had started; and how that is said.

The store counts (`core.selection`); here are the statistics. A rollout that was cut off would have run longer: how long
those that were started run is estimated as survival analysis does it (Kaplan and Meier), so that what was cut counts
for as long as it ran. What such rollouts would have earned is estimated by the rewards of finished ones that ran as
long. A difference counts as a bias if chance alone would make it less than once in some hundred reports (a z-score of 3
or more, with groups, not rollouts, as what is drawn), and if it is large enough to matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field

from raystore.core.fates import ENDINGS, UNDER_WAY
from raystore.core.records import unpacked
from raystore.core.selection import Ended, Spread, middle_of
from raystore.reports.svg import Chart, Points, charts
from raystore.reports.words import counted, figure, share

__all__ = ["Comparison", "EndingReport", "NumberSummary", "SelectionReport", "ValueReport"]

SIGNIFICANT = 3.0  #: z-score, in either direction
MATTERS = 0.05  #: relative difference of a mean, ...
MATTERS_REWARD = 0.1  #: ... of a mean reward, in standard deviations, ...
MATTERS_SHARE = 0.05  #: ... and of the share that is trained on
ENOUGH = 30  #: groups that were trained on, below which nothing is said
ENOUGH_OF_VALUE = 50  #: rollouts of one value, likewise
NAMED = 8  #: items that a sentence names

#: The numbers that are compared, and how they are called.
NUMBERS = {"seconds": "duration", "turns": "turns", "tokens": "generated tokens", "reward": "reward"}


class NumberSummary(BaseModel):
    """How numbers are distributed; quantiles are within 5 %.

    Attributes:
        count: how many there are.
        mean: of them; None if there are none, as are the next two.
        p50: half of them are not above this.
        p90: nine of ten are not.
    """

    count: int
    mean: float | None
    p50: float | None
    p90: float | None


class EndingReport(BaseModel):
    """The rollouts of one ending.

    Attributes:
        ending: trained, filtered, stale, ... (`docs/rl.md` says what each means).
        groups: that ended so; of an ending that only members have, 0.
        rollouts: that were started and ended so.
        share: of all rollouts that were started.
        reasons: how many for which reason: outcomes of attempts, or the rule that filtered.
        cut: of the rollouts, those that were cut off while they ran.
        duration: seconds that they ran: the latest attempt, with those whose saved states it went on from, up to the
            cut of those that were cut off.
        turns: model calls; only of rollouts whose runner reported all of them, which it does not for those that were
            cut off, or went on from a saved state.
        tokens: that these calls generated.
        reward: of those that have one.
    """

    ending: str
    groups: int
    rollouts: int
    share: float
    reasons: dict[str, int]
    cut: int
    duration: NumberSummary
    turns: NumberSummary
    tokens: NumberSummary
    reward: NumberSummary


class ValueReport(BaseModel):
    """The rollouts of one environment, tag or policy version whose fate is known.

    Attributes:
        dimension: "environment", "version", or "tag NAME".
        value: as text; "other" for those beyond the hundredth.
        started: rollouts.
        trained: of these, those that were trained on.
        reward_started: their mean reward, of those that have one; None if none has.
        reward_trained: the same of those that were trained on.
    """

    dimension: str
    value: str
    started: int
    trained: int
    reward_started: float | None
    reward_trained: float | None


class Comparison(BaseModel):
    """What was trained on against all that was started, in one respect.

    Attributes:
        dimension: "duration", "turns", "generated tokens", "reward"; or that of a value.
        value: of an environment, tag or version; None for numbers.
        started: the mean of all that were started, estimated where some were cut off; of a value, the share of
            all rollouts that was trained on.
        trained: the mean of those that were trained on; of a value, the share of its rollouts that was.
        z: the difference in standard errors.
        is_biased: whether it is significant and large enough to matter.
        because: the ending that accounts for most of it; None without a bias.
        sentence: the same in words.
    """

    dimension: str
    value: str | None
    started: float
    trained: float
    z: float
    is_biased: bool
    because: str | None
    sentence: str


class SelectionReport(BaseModel):
    """What a feed, or another consumer, trained on, and what it threw away; made by `store.selection_report`.

    Attributes:
        consumer: the feed or consumer.
        since: from when on is counted, in seconds since the epoch; may be somewhat earlier than was asked for.
        until: when it was counted.
        started: rollouts that began to run.
        trained: of these, those in batches that were acknowledged and not undone.
        under_way: of these, those whose fate is not known.
        endings: the fates of all rollouts, the commonest first.
        values: by environment and tag, the commonest first; and by policy version, the newest first.
        comparisons: what was trained on against what was started, biases first.
        items: how many items of each environment came to which ending.
        starved: of each environment, how many items came to an end and were never trained on, in the whole run, and
            the indexes of the first hundred.
        untracked: ends of items whose index is above 4,000,000, of which it is not known.
        sentences: all of it in words.
    """

    consumer: str
    since: float
    until: float
    started: int
    trained: int
    under_way: int
    endings: list[EndingReport]
    values: list[ValueReport]
    comparisons: list[Comparison]
    items: dict[str, dict[str, int]]
    starved: dict[str, tuple[int, list[int]]]
    untracked: int
    sentences: list[str]
    curves: dict[str, dict[str, list[tuple[float, float]]]] = Field(default_factory=dict, repr=False)

    @property
    def is_biased(self) -> bool:
        """Whether what was trained on differs from what was started, by more than chance."""
        return any(one.is_biased for one in self.comparisons)

    def table(self) -> str:
        """The endings as a table of text, and the sentences below it."""
        head = ["ending", "groups", "rollouts", "share", "cut off", "mean s", "turns", "tokens", "reward"]
        rows = [head]
        for one in self.endings:
            means = [one.duration.mean, one.turns.mean, one.tokens.mean, one.reward.mean]
            counts = [f"{one.groups:,}", f"{one.rollouts:,}", f"{one.share:.1%}", f"{one.cut:,}"]
            rows.append([one.ending, *counts, *("" if mean is None else f"{mean:.4g}" for mean in means)])
        widths = [max(len(row[place]) for row in rows) for place in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if not place else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, "", *self.sentences]) + "\n"

    def svg(self) -> str:
        """A picture: how what was started, and what was trained on, are distributed."""
        logarithmic = {"duration": "seconds", "turns": "turns", "generated tokens": "tokens"}
        made = []
        for name, curves in self.curves.items():
            lines: dict[str, Points] = dict(curves)
            below = logarithmic.get(name, name)
            made.append(Chart(lines, title=f"{name}: share up to", below=below, is_logarithmic=name in logarithmic))
        return charts(made, title=f"what was started for {self.consumer}, and what it trained on")


# -- distributions -----------------------------------------------------------------------------------------------------


def _spread(ended: Ended, number: str) -> Spread:
    """One of the numbers of rollouts; of durations, those of rollouts that were cut off, too."""
    if number != "seconds":
        found: Spread = getattr(ended, number)
        return found
    whole = Spread()
    whole.merge(ended.seconds)
    whole.merge(ended.cut)
    return whole


def _mean(ended: Ended, number: str) -> float:
    """The mean; of durations, as it would be if none had been cut off."""
    if number == "seconds" and ended.cut.count:
        return sum(mass * middle_of(place) for place, mass in _masses(ended, number).items())
    spread = _spread(ended, number)
    return spread.total / spread.count if spread.count else 0.0


def _masses(ended: Ended, number: str) -> dict[int, float]:
    """The share of them in each class; of durations, as they would be if none had been cut off."""
    return _survival(ended.seconds, ended.cut) if number == "seconds" else _shares(getattr(ended, number))


def _shares(spread: Spread) -> dict[int, float]:
    return {number: count / spread.count for number, count in spread.classes()} if spread.count else {}


def _survival(ended: Spread, cut: Spread) -> dict[int, float]:
    """The estimate of Kaplan and Meier; what outlived all that ended is in the last class."""
    ends, cuts = dict(ended.classes()), dict(cut.classes())
    at_risk, survive = ended.count + cut.count, 1.0
    masses: dict[int, float] = {}
    for number in sorted(ends.keys() | cuts.keys()):
        if ends.get(number):
            left = survive * (1 - ends[number] / at_risk)
            masses[number] = survive - left
            survive = left
        at_risk -= ends.get(number, 0) + cuts.get(number, 0)
    if survive > 1e-12 and (known := ends.keys() | cuts.keys()):
        last = max(known)
        masses[last] = masses.get(last, 0.0) + survive
    return masses


def _distribution(spread: Spread) -> NumberSummary:
    if not spread.count:
        return NumberSummary(count=0, mean=None, p50=None, p90=None)
    found = [_quantile(_shares(spread), part) for part in (0.5, 0.9)]
    return NumberSummary(count=spread.count, mean=spread.total / spread.count, p50=found[0], p90=found[1])


def _moments(masses: Mapping[int, float], *, logarithmic: bool) -> tuple[float, float]:
    """Mean and variance of what is distributed so, or of its logarithm."""
    values = [(_logarithm(number) if logarithmic else middle_of(number), mass) for number, mass in masses.items()]
    mean = sum(value * mass for value, mass in values)
    return mean, max(sum(mass * (value - mean) ** 2 for value, mass in values), 0.0)


def _logarithm(number: int) -> float:
    return math.log(max(middle_of(number), 1e-6))


def _curve(masses: Mapping[int, float]) -> list[tuple[float, float]]:
    """The share that is not above a number, by number."""
    points, seen = [], 0.0
    for number in sorted(masses):
        seen += masses[number]
        points.append((middle_of(number), min(seen, 1.0)))
    return points


# -- the report --------------------------------------------------------------------------------------------------------


def selection_report(told: Mapping[str, Any]) -> SelectionReport:
    """The report that follows from what the store has counted."""
    return _Report(told).made()


class _Report:
    """A report while it is made."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        self.told = told
        self.endings: dict[str, Ended] = {}
        for rows in (told["endings"], told["under_way"]):  # members of groups under way may have an ending
            for name, row in rows.items():
                self.endings.setdefault(name, Ended()).merge(unpacked(Ended, row))
        self.endings = {name: one for name, one in self.endings.items() if one.rollouts}
        self.all = Ended()
        for one in self.endings.values():
            self.all.merge(one)
        self.trained = self.endings.get("trained", Ended())
        #: How much less the mean of a part of what was started varies than that of as many drawn anew.
        self.left_out = 1 - self.trained.rollouts / self.all.rollouts if self.all.rollouts else 0.0

    def made(self) -> SelectionReport:
        values = self._values()
        comparisons = self._compared(values)
        items: dict[str, dict[str, int]] = {}
        for environment, ending, count in self.told["items"]:
            items.setdefault(environment, {})[ending] = count
        starved = {environment: (count, list(indexes)) for environment, count, indexes in self.told["starved"]}
        under_way = self.endings.get(UNDER_WAY, Ended()).rollouts
        return SelectionReport(
            consumer=self.told["consumer"],
            since=self.told["since"],
            until=self.told["until"],
            started=self.all.rollouts,
            trained=self.trained.rollouts,
            under_way=under_way,
            endings=[self._ending(name) for name in self._ranked()],
            values=values,
            comparisons=comparisons,
            items=items,
            starved=starved,
            untracked=self.told["untracked"],
            sentences=[
                *self._overall(under_way),
                *self._thrown_away(),
                *self._rules(),
                *(one.sentence for one in comparisons if one.is_biased),
                *self._verdict(comparisons),
                *_starved(starved, items),
            ],
            curves=self._curves(),
        )

    def _ranked(self) -> list[str]:
        """The endings, the commonest first; what is under way last."""
        return sorted(self.endings, key=lambda name: (name == UNDER_WAY, -self.endings[name].rollouts))

    def _ending(self, name: str) -> EndingReport:
        one = self.endings[name]
        return EndingReport(
            ending=name,
            groups=one.groups,
            rollouts=one.rollouts,
            share=one.rollouts / self.all.rollouts,
            reasons=dict(sorted(one.reasons.items(), key=lambda pair: -pair[1])),
            cut=one.cut.count,
            duration=_distribution(_spread(one, "seconds")),
            turns=_distribution(one.turns),
            tokens=_distribution(one.tokens),
            reward=_distribution(one.reward),
        )

    def _values(self) -> list[ValueReport]:
        rows = []
        for dimension, value, (started, rewards, total, trained, of_trained, total_trained) in self.told["values"]:
            if started <= 0:
                continue
            rows.append(
                ValueReport(
                    dimension=dimension,
                    value=value,
                    started=int(started),
                    trained=int(trained),
                    reward_started=total / rewards if rewards else None,
                    reward_trained=total_trained / of_trained if of_trained else None,
                )
            )
        return sorted(rows, key=_rank)

    def _curves(self) -> dict[str, dict[str, list[tuple[float, float]]]]:
        both = {"started": self.all, "trained on": self.trained}
        drawn = {
            called: {name: _curve(masses) for name, one in both.items() if (masses := _masses(one, number))}
            for number, called in NUMBERS.items()
        }
        return {called: lines for called, lines in drawn.items() if lines}

    # -- what differs ------------------------------------------------------------------------------------------------

    def _compared(self, values: Sequence[ValueReport]) -> list[Comparison]:
        found = [one for number in NUMBERS if (one := self._numbers(number)) is not None]
        found += self._categories(values)
        return sorted(found, key=lambda one: (not one.is_biased, one.value is not None, -abs(one.z)))

    def _numbers(self, number: str) -> Comparison | None:
        """The means of a number: of what was trained on, and of what was started."""
        started, trained = _masses(self.all, number), _masses(self.trained, number)
        if not started or not trained or self.trained.groups < ENOUGH:
            return None
        if number == "reward":
            return self._rewards()
        means = _mean(self.trained, number), _mean(self.all, number)
        (one, variance), (other, _) = (_moments(masses, logarithmic=True) for masses in (started, trained))
        z = self._z(other - one, variance)
        ratio = means[0] / means[1] if means[1] else 1.0
        is_biased = abs(z) >= SIGNIFICANT and abs(ratio - 1) >= MATTERS
        name = NUMBERS[number]
        because = self._because(number) if is_biased else None
        said = {
            "seconds": ("ran", "as long as"), "turns": ("had", "as many turns as"),
            "tokens": ("generated", "as many tokens as"),
        }[number]  # fmt: skip
        sentence = (
            f"What was trained on {said[0]} {ratio:.2f} times {said[1]} what was started (means "
            f"{figure(means[0])} and {figure(means[1])})" + _by(because)
        )
        return Comparison(
            dimension=name, value=None, started=means[1], trained=means[0], z=z, is_biased=is_biased,
            because=because, sentence=sentence,
        )  # fmt: skip

    def _rewards(self) -> Comparison:
        """The mean rewards; that of what was started estimated by duration, if enough of it was cut off."""
        trained = self.trained.reward.total / self.trained.reward.count
        known = self.all.reward
        started, noise = known.total / known.count, 0.0
        variance = max(known.squares / known.count - started * started, 0.0)
        is_estimated = self.all.cut.count > 0.01 * self.all.rollouts and bool(self.told["by_seconds"])
        if is_estimated:
            started, noise = self._by_duration()
        z = self._z(trained - started, variance, noise)
        is_biased = abs(z) >= SIGNIFICANT and abs(trained - started) >= MATTERS_REWARD * math.sqrt(variance)
        because = self._because("reward") if is_biased else None
        how = ", by the rewards of finished rollouts that ran as long" if is_estimated else ""
        direction = "above" if trained > started else "below"
        sentence = (
            f"The mean reward of what was trained on is {figure(trained)}, {direction} the {figure(started)} of what "
            f"was started{how}" + _by(because)
        )
        return Comparison(
            dimension="reward", value=None, started=started, trained=trained, z=z, is_biased=is_biased,
            because=because, sentence=sentence,
        )  # fmt: skip

    def _by_duration(self) -> tuple[float, float]:
        """The mean reward if all that was started had finished, and the variance of that estimate.

        Each class of durations counts as often as rollouts are started that run so long, with the mean reward of those
        of it that finished; a class in which none did, with that of the nearest one.
        """
        earned = {number: row for number, row in self.told["by_seconds"] if row[0] > 0}
        weights: dict[int, float] = {}
        for number, mass in _masses(self.all, "seconds").items():
            nearest = min(earned, key=lambda one: abs(one - number))
            weights[nearest] = weights.get(nearest, 0.0) + mass
        mean, noise = 0.0, 0.0
        for number, weight in weights.items():
            count, total, squares = earned[number]
            here = total / count
            mean += weight * here
            noise += weight * weight * max(squares / count - here * here, 0.0) / count
        return float(mean), float(noise * self._size())

    def _size(self) -> float:
        """Rollouts of a group: those of one are alike, so that a group counts as one draw."""
        return self.trained.rollouts / max(self.trained.groups, 1)

    def _z(self, difference: float, variance: float, noise: float = 0.0) -> float:
        error = math.sqrt(variance * self.left_out / max(self.trained.groups, 1) + noise)
        if abs(difference) < 1e-12:
            return 0.0
        return max(min(difference / error, 1e6), -1e6) if error > 0 else math.copysign(1e6, difference)

    def _because(self, number: str) -> str | None:
        """The ending that takes most away from the mean of a number."""
        thrown = [name for name in self.endings if name not in ("trained", UNDER_WAY)]
        return max(thrown, key=lambda name: abs(self._pull(name, number)), default=None)

    def _pull(self, name: str, number: str) -> float:
        """How far an ending pulls a mean; by duration where most of it was cut off, so that it has no reward."""
        one = self.endings[name]
        if number == "reward" and one.cut.count > one.reward.count:
            number = "seconds"
        here, whole = _spread(one, number), _spread(self.all, number)
        mean = whole.total / max(whole.count, 1)
        variance = whole.squares / max(whole.count, 1) - mean * mean
        return (here.total - here.count * mean) / math.sqrt(max(variance, 1e-12))

    def _categories(self, values: Sequence[ValueReport]) -> list[Comparison]:
        """Environments, tags and versions of which another share is trained on than of all."""
        found = []
        for dimension in dict.fromkeys(row.dimension for row in values):
            rows = [row for row in values if row.dimension == dimension]
            started, trained = sum(row.started for row in rows), sum(row.trained for row in rows)
            usual = trained / started
            if len(rows) < 2 or self.trained.groups < ENOUGH:
                continue
            for row in rows:
                if row.started < ENOUGH_OF_VALUE:
                    continue
                here = row.trained / row.started
                error = math.sqrt(max(usual * (1 - usual), 1e-12) * self._size() / row.started)
                z = max(min((here - usual) / error, 1e6), -1e6)
                is_biased = abs(z) >= SIGNIFICANT + 1 and abs(here / usual - 1 if usual else 0) >= MATTERS_SHARE
                sentence = f"Of {dimension} {row.value!r} {here:.0%} were trained on, of all {usual:.0%}"
                found.append(
                    Comparison(
                        dimension=dimension,
                        value=row.value,
                        started=usual,
                        trained=here,
                        z=z,
                        is_biased=is_biased,
                        because=None,
                        sentence=sentence,
                    )
                )
        return found

    # -- in words ----------------------------------------------------------------------------------------------------

    def _overall(self, under_way: int) -> Iterable[str]:
        if not self.all.rollouts:
            yield f"Nothing was started for {self.told['consumer']!r} in this time"
            return
        thrown = self.all.rollouts - self.trained.rollouts - under_way
        yield (
            f"Of {counted(self.all.rollouts, 'rollout')} that were started, {self.trained.rollouts:,} "
            f"({share(self.trained.rollouts, self.all.rollouts)}) were trained on, {thrown:,} "
            f"({share(thrown, self.all.rollouts)}) were not, and {under_way:,} are under way"
        )
        if not self.told["is_of_feed"]:
            yield "Counted are the rollouts that the store still has, since only feeds count what becomes of each"

    def _thrown_away(self) -> Iterable[str]:
        usual = _mean(self.all, "seconds")
        for name in self._ranked():
            one = self.endings[name]
            if name in ("trained", UNDER_WAY):
                continue
            text = f"{one.rollouts:,} ({share(one.rollouts, self.all.rollouts)}) ended as {name}: {ENDINGS[name]}"
            ran = _spread(one, "seconds")
            ratio = ran.total / ran.count / usual if ran.count and usual else 1.0
            if ratio - 1 >= MATTERS or (1 - ratio >= MATTERS and not one.cut.count):
                least = "at least " if one.cut.count else ""
                text += f". They ran {least}{ratio:.2g} times as long as what was started"
                if one.cut.count:
                    text += f" ({one.cut.count:,} were cut off while they ran)"
            yield text

    def _rules(self) -> Iterable[str]:
        """What the rules of the feed did."""
        failed = self.endings.get("replaced", Ended()).rollouts
        if failed:
            there = self.trained.rollouts + failed
            mean = self.trained.reward.total / self.trained.reward.count if self.trained.reward.count else None
            text = (
                f"on_failure='replace' left {share(failed, there)} of what the policy does out of training: its "
                f"failures"
            )
            if mean is not None:
                text += (
                    f". With a reward of 0 for them the mean reward would be {figure(mean * (1 - failed / there))}, "
                    f"not {figure(mean)}"
                )
            yield text
        cut = self.endings.get("raced", Ended())
        if cut.rollouts:
            whole, trained = _masses(self.all, "seconds"), _masses(self.trained, "seconds")
            yield (
                f"race=True cut off {cut.rollouts:,} rollouts ({share(cut.rollouts, self.all.rollouts)}), the slowest "
                f"of their groups: half of what was started runs up to {figure(_quantile(whole, 0.5))} s, half of what "
                f"was trained on up to {figure(_quantile(trained, 0.5))} s"
            )

    def _verdict(self, comparisons: Sequence[Comparison]) -> Iterable[str]:
        if not self.trained.rollouts:
            return
        if self.trained.groups < ENOUGH:
            few = counted(self.trained.groups, "group")
            yield f"Only {few} were trained on: too few to tell a bias from chance (from {ENOUGH} on it is said)"
        elif not any(one.is_biased for one in comparisons):
            names = list(dict.fromkeys(one.dimension for one in comparisons))
            yield f"No bias found: what was trained on is like what was started in {', '.join(names)}"


def _rank(row: ValueReport) -> tuple[str, int]:
    """Versions from the newest on, other values from the commonest on."""
    is_version = row.dimension == "version" and row.value.isdigit()
    return row.dimension, -(int(row.value) if is_version else row.started)


def _quantile(masses: Mapping[int, float], part: float) -> float:
    """The number that this part of all is not above."""
    seen = 0.0
    for number in sorted(masses):
        seen += masses[number]
        if seen >= part - 1e-9:
            return middle_of(number)
    return 0.0


def _by(ending: str | None) -> str:
    return f"; most of that by what ended as {ending}" if ending else ""


def _starved(starved: Mapping[str, tuple[int, list[int]]], items: Mapping[str, Any]) -> Iterable[str]:
    for environment, (count, indexes) in starved.items():
        of = f" of {environment!r}" if len(items) > 1 else ""
        named = ", ".join(map(str, indexes[:NAMED]))
        more = f" and {count - NAMED:,} more" if count > NAMED else ""
        if count == 1:
            yield f"Item {named}{of} was drawn and never trained on"
        else:
            yield f"Items {named}{more}{of} were drawn and never trained on"
