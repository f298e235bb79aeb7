"""What a diagnosis is made of: what the process of the store knows, and the order in which findings are told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from raystore.core.findings import Finding
from raystore.errors import StoreError
from raystore.journal.writer import JournalWriter
from raystore.service.presence import Pools

# Of what there may be much, so many are looked at.
QUEUES = 1_000  #: with rollouts that wait, the longest
NAMED = 5  #: things of one kind that are named
ITEMS = 2_000  #: of a feed
GROUPS = 200  #: that are open
MEMBERS = 1_000  #: of a group
PLACES = 1_000  #: of a runner

# The tiers of findings, in the order in which they are told. What stops the whole store. What stops a trainer for good,
# or until one group is complete, although a batch is there. What holds up rollouts that wait. What a trainer waits for,
# or lets others wait for. That there is nothing to do. What may bind soon. What is said in any case.
STORE, STOPPED, WAITING, TRAINING, NOTHING, SOON, LAST = range(7)


class Told(NamedTuple):
    """A finding, and how much it weighs."""

    tier: int
    weight: int  #: rollouts that it holds up
    finding: Finding


class Journal(NamedTuple):
    """How the writer of a journal gets on."""

    path: str
    is_full: bool
    behind_seconds: float  #: for which the oldest change has waited for the disk
    behind_bytes: int


def journal_of(writer: JournalWriter) -> Journal:
    """How a writer gets on."""
    return Journal(str(writer.directory.path), writer.is_full, *writer.behind())


@dataclass(slots=True, frozen=True)
class Known:
    """What the process of a store knows beside the state, at one instant."""

    now: float  #: on the store's clock
    age: float  #: on the clock by which sessions age
    pools: Pools | None = None  #: None: of a run that is only read, of which nobody knows who asked for work
    idle: int = 0  #: calls that wait for work
    suspended: int = 0  #: sessions that must show that they live
    asking: frozenset[str] = frozenset()  #: consumers that wait for a batch
    journal: Journal | None = None
    failed: StoreError | None = None  #: why the store takes no changes
