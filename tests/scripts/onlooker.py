"""Another script, which reads what `zoo` put into a store, and gives some of it back."""

from __future__ import annotations

import sys
from typing import Any

import raystore as rs
from raystore.values import pickler


def contents(store: rs.InMemoryLightningStore) -> dict[str, Any]:
    return {name: value for rollout in store.sync.query_rollouts() for name, value in rollout.input.items()}


journal, agent = sys.argv[1:]
with rs.InMemoryLightningStore(journal=journal) as store:
    if agent == "none":
        one, two = contents(store), contents(store)
        assert one["kind"] is two["kind"] and one["kind"].shout() == "MATH"
        assert all(a is b for a, b in zip(one["all"], two["all"], strict=True))
        for name in ("right", "base", "point", "slotted", "pair", "couple", "model", "holder", "held", "deep"):
            assert one[name] == two[name] and type(one[name]) is type(two[name]), name
        kind, point, base, sub, model, pair, concrete, odd = one["all"]
        assert type(one["kind"]) is kind and type(one["point"]) is point and isinstance(one["sub"], base)
        assert one["helper"]() is one["kind"] and one["anonymous"]() is one["kind"]
        assert one["concrete"].own_class() is concrete and one["bound"]() == (base, one["kind"])
        assert "zoo" not in sys.modules
        store.sync.enqueue_rollout({name: one[name] for name in ("kind", "point", "model", "held", "helper", "deep")})
    else:
        with open(agent, "rb") as file:
            call = pickler.loads_agent(file.read())
        print("reward", rs.run_one(call, contents(store)["kind"]).reward)
