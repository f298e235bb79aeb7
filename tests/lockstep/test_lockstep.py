"""raystore's in-memory store in lock-step with agent-lightning 0.3.0's: any operations, the same answers.

Hypothesis draws programs and makes a failing one small. `LOCKSTEP_STEPS` says how many operations in all (default: a
short form of under three minutes); whatever differs must be on the list of `docs/conformance.md`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.lockstep.operations import operations, run
from tests.lockstep.pair import Pair

STEPS = int(os.environ.get("LOCKSTEP_STEPS", "8000"))
PROGRAM = 60  #: operations of one program

loop = asyncio.new_event_loop()
logging.getLogger("agentlightning").setLevel(logging.CRITICAL)
logging.getLogger("raystore").setLevel(logging.CRITICAL)

done: Counter[str] = Counter()
met: Counter[str] = Counter()


class Lockstep(RuleBasedStateMachine):
    """Two stores, and one operation after the other."""

    pair: Pair

    @initialize(memory=st.booleans())
    def start(self, memory: bool) -> None:
        self.pair = Pair(memory=memory)

    @rule(operation=operations)
    def step(self, operation: tuple[str, dict[str, object]]) -> None:
        name, drawn = operation
        loop.run_until_complete(run(self.pair, name, drawn))
        done[name] += 1

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            met.update(self.pair.met)
            self.pair.close()


def test_any_operations_have_the_same_answers() -> None:
    """Each answer, each error, and all that is held afterwards; what differs is on the list."""
    while (left := STEPS - done.total()) > 0:  # not every program is of full length
        settings = hypothesis.settings(
            max_examples=-(-left // PROGRAM), stateful_step_count=PROGRAM, database=None, print_blob=True
        )
        run_state_machine_as_test(Lockstep, settings=settings)
    print(f"\n{done.total()} operations: {dict(done.most_common())}")
    print(f"differences met: {dict(met.most_common())}")
