"""A reader that opens no pickle sees what is plain, and of all else the type and the size."""

from __future__ import annotations

import fractions
from pathlib import Path
from typing import Any

import numpy
import pytest

import raystore as rs
from raystore.core.payload import Payload
from raystore.values.closed import Closed, are_closed, pickles_closed
from raystore.values.objects import Origin
from raystore.wire import codec, convert
from tests.cli.commands import here
from tests.cli.small_run import Unknown
from tests.conftest import MakeMemoryStore
from tests.helpers import make_span, present

PROMPT = rs.PromptTemplate(template="hi {x}", engine="f-string")
MODEL = rs.ProxyLLM(endpoint="http://proxy", model="m", sampling_parameters={"stop": ("a", "b")})


class Derived(rs.PromptTemplate):
    """A resource of a user's class."""


def read(payload: Any) -> rs.ResourcesUpdate:
    """Resources with this payload, as a client reads them."""
    return convert.to_resources(("r", 1, 0.0, 0.0, None, payload, False), Origin(None))


def written(resources: dict[str, Any]) -> Any:
    """The payload of resources, as a client writes it."""
    limits = dict.fromkeys(["value_bytes", "span_bytes", "call_bytes", "state_bytes"], 10**6)
    return convert.Encoder(limits, None).resources(resources)[0]


def size_of(payload: Any) -> int:
    """Bytes of the pickle in a payload."""
    return len(payload.data if isinstance(payload, Payload) else payload) - 1


def test_prompts_and_endpoints_are_plain_data() -> None:
    """What a command line shows of them needs no pickle; classes, tuples and all come back."""
    payload = written({"prompt": PROMPT, "model": MODEL})
    assert not codec.is_pickled(payload) and b"raystore" not in payload
    with pickles_closed():
        update = read(payload)
    assert update.resources == {"prompt": PROMPT, "model": MODEL}
    assert type(update.resources["model"]) is rs.ProxyLLM
    assert vars(update.resources["model"])["sampling_parameters"] == {"stop": ("a", "b")}


def test_what_is_no_plain_data_stays_closed_beside_it() -> None:
    """Weights, and resources of a derived class; opened by everybody else."""
    resources = {
        "prompt": PROMPT,
        "mine": Derived(template="t", engine="jinja"),
        "weights": rs.ObjectResource(value=[1]),
    }
    payload = written(resources)
    with pickles_closed():
        shown = read(payload).resources
    assert shown["prompt"] == PROMPT
    assert isinstance(shown["mine"], Closed) and shown["mine"].type.endswith("Derived")
    assert isinstance(shown["weights"], Closed) and shown["weights"].type == "raystore.types.contract.ObjectResource"
    opened = read(payload).resources
    assert opened == resources and type(opened["mine"]) is Derived and list(opened) == list(resources)


def test_resources_of_older_journals_are_read() -> None:
    """They are one pickle of all; a closed reader sees that."""
    payload = codec.encode({"prompt": PROMPT}, "resources", 10**6)
    assert codec.is_pickled(payload) and read(payload).resources == {"prompt": PROMPT}
    with pickles_closed():
        whole: Any = read(payload).resources
    assert isinstance(whole, Closed) and whole.type == "dict" and whole.size == size_of(payload)
    assert read(codec.encode({}, "resources", 10**6)).resources == {}


@pytest.mark.usefixtures("cluster")
def test_references_of_several_resources_keep_their_places() -> None:
    """They travel beside the payload, and each resource has its own."""
    import ray

    refs = [ray.put(number) for number in range(3)]
    payload = written({"a": rs.ObjectResource(value=refs[:2]), "p": PROMPT, "b": rs.ObjectResource(value=[refs[2]])})
    assert isinstance(payload, Payload) and len(payload.refs) == 3
    opened: Any = read(payload).resources
    assert opened["a"].value == refs[:2] and opened["b"].value == [refs[2]] and opened["p"] == PROMPT


@pytest.mark.parametrize(
    ("value", "type"),
    [
        (Unknown(), "tests.cli.small_run._opened"), ({"x": Unknown()}, "dict"), ([Unknown()], "list"),
        (fractions.Fraction(1, 3), "fractions.Fraction"), ({1, 2}, "set"), (2**70, "an object"),
        ("\ud800", "str"),
    ],
    ids=["object", "dict", "list", "fraction", "set", "large int", "surrogate"],
)  # fmt: skip
def test_a_closed_pickle_tells_its_type_and_size(value: Any, type: str) -> None:
    """By its first operations; it is not opened to find out."""
    payload = codec.encode(value, "value", 10**6)
    with pickles_closed():
        found = codec.decode(payload)
    assert isinstance(found, Closed) and found.type == type and found.size == size_of(payload)
    assert f"{found.size} bytes, not opened" in repr(found)


def test_an_array_is_named() -> None:
    """As people know it, or by the function that makes it."""
    with pickles_closed():
        assert codec.decode(codec.encode(numpy.zeros(3), "value", 10**6)).type.startswith("numpy.")


async def test_nothing_of_a_store_is_opened(make_memory_store: MakeMemoryStore, tmp_path: Path) -> None:
    """Rollouts, metadata, groups, resources, attributes: a pickle that raises when it is opened is in each."""
    store = make_memory_store(journal=str(tmp_path / "journal"))
    await store.enqueue_group(Unknown(), 2, metadata={"m": Unknown()}, group_id="g")
    await store.add_resources({"weights": rs.ObjectResource(value=Unknown()), "p": PROMPT})
    claimed = present(await store.dequeue_rollout("w"))
    await store.add_span(make_span(claimed))
    for reader in (store, rs.recover(tmp_path / "journal")):
        with pickles_closed():
            rollout = (await reader.query_rollouts())[0]
            assert isinstance(rollout.input, Closed) and isinstance(rollout.metadata, Closed)
            assert isinstance(present(await reader.get_group("g")).input, Closed)
            found = present(await reader.get_latest_resources()).resources
            assert isinstance(found["weights"], Closed) and found["p"] == PROMPT
            assert (await reader.query_spans(claimed.rollout_id))[0].attributes == {"k": "v"}


class Estimator:
    """A function of a user, as stores take it."""

    def __call__(self, span: Any) -> int:
        return 1

    def __reduce__(self) -> Any:
        return _estimator, ()


def _estimator() -> Estimator:
    assert not are_closed(), "a pickle was opened"
    return Estimator()


@pytest.mark.usefixtures("cluster")
def test_the_configuration_of_a_store_is_not_opened() -> None:
    """It may hold a user's function, which only writers of spans need."""
    with rs.start("estimating", span_size_estimator=Estimator()):
        assert here("status", "--name", "estimating").code == 0


def test_a_span_whose_body_is_a_pickle_says_so() -> None:
    """In an attribute; its name and times are beside its body."""
    body = codec.encode(["OK", {"x": Unknown()}, None, None, None], "span", 10**6)
    row = ("r", "a", 1, "s", "t", None, "name", 1.0, 2.0, None, body, 0)
    with pickles_closed():
        span = convert.to_span(row)
    assert span.name == "name" and "not opened" in str(span.attributes[convert.NOT_OPENED])


async def test_looking_leaves_no_mark() -> None:
    """What a command reads does not count as read, for retention and eviction; what a trainer reads does."""
    async with rs.InMemoryLightningStore(clock="manual") as store:
        made = [await store.start_rollout(number) for number in range(2)]
        for rollout in made:
            await store.add_span(
                rs.Span.from_attributes(
                    name="a", rollout_id=rollout.rollout_id, attempt_id=rollout.attempt.attempt_id, sequence_id=1,
                    trace_id="t", span_id="s", parent_id=None, start_time=1.0, end_time=2.0, attributes={},
                )
            )  # fmt: skip
            await store.update_attempt(rollout.rollout_id, "latest", status="succeeded")
        first, second = (store._service.state.entries[rollout.rollout_id] for rollout in made)
        with pickles_closed():
            assert len(await store.query_spans(made[0].rollout_id)) == 1
            assert all((await store.query_many_spans([rollout.rollout_id for rollout in made])).values())
        assert not first.read and not second.read
        await store.query_spans(made[1].rollout_id)
        assert not first.read and second.read
