"""Wrong calls as people make them: each error names the value and says what to write instead.

Not here: every wrong value at every argument (`test_wrong_arguments`), which asks only for a named error.
"""

from __future__ import annotations

import inspect
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pytest
from pydantic import AliasChoices, AliasPath, BaseModel, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # which pydantic needs before Python 3.12

import raystore as rs
from raystore.api import METHODS, LightningStore
from raystore.client.client import StoreClient
from raystore.errors import InvalidValueError
from raystore.errors.text import explained
from raystore.values.models import Model, refusal
from tests.conftest import MakeMemoryStore
from tests.helpers import AnyStore, claim, present

UNTYPED: Any = rs  #: for calls that are wrong on purpose
REQUEST = rs.EnqueueRolloutRequest(input=1)
ROLLOUT = rs.Rollout(rollout_id="ro-1", input=1, start_time=0.0)
ATTEMPTED = rs.AttemptedRollout(
    rollout_id="ro-1",
    input=1,
    start_time=0.0,
    attempt=rs.Attempt(rollout_id="ro-1", attempt_id="at-1", sequence_id=1, start_time=0.0),
)
RESOURCES = {"w": rs.ObjectResource(value=1)}


class Mine(rs.Resource):
    """A kind of resource that no store knows."""

    resource_type: Literal["mine"] = "mine"


class MyLLM(rs.LLM):
    """Likewise, though derived from one that is known."""

    resource_type: Literal["my_llm"] = "my_llm"  # type: ignore[assignment]


class Leveled(rs.EnqueueRolloutRequest):
    """A request of a user's own."""

    level: int = 0


def changed(**fields: Any) -> rs.EnqueueRolloutRequest:
    """A request that was copied with other values, which pydantic does not look at."""
    return rs.EnqueueRolloutRequest(input=1).model_copy(update=fields)


class Call:
    """A call of a store's method, with what its error is to say."""

    def __init__(self, method: str, *words: str) -> None:
        self.method, self.words = method, words
        self.given: tuple[Any, ...] = ()
        self.named: dict[str, Any] = {}

    def __call__(self, *given: Any, **named: Any) -> Call:
        self.given, self.named = given, named
        return self

    def __repr__(self) -> str:
        return f"{self.method}(*{self.given}, **{self.named})"


VALUES = [
    Call("enqueue_rollout", "mode='training'", "did you mean 'train'?")("x", mode="training"),
    Call("update_rollout", "mode='validation'", "did you mean 'val'?")("x", mode="validation"),
    Call("enqueue_rollout", "priority='high'", "a whole number")("x", priority="high"),
    Call("enqueue_rollout", "config['timeout']=60", "did you mean 'timeout_seconds'?")("x", config={"timeout": 60}),
    Call("enqueue_rollout", "config.timeout_seconds=-1", "0 or more")("x", config={"timeout_seconds": -1}),
    Call("enqueue_rollout", "tags=<list ['math']>", "a mapping", "metadata")("x", tags=["math"]),
    Call("enqueue_rollout", "tags['a']=", "metadata")("x", tags={"a": {"b": 1}}),
    Call("enqueue_group", "mode='trian'", "did you mean 'train'?")("x", 2, mode="trian"),
    Call("start_rollout", "mode='eval'", "did you mean 'val'?")("x", mode="eval"),
    Call("update_attempt", "status='done'", "'succeeded'")("ro", "latest", status="done"),
    Call("update_attempt", "status='fail'", "did you mean 'failed'?")("ro", "latest", status="fail"),
    Call("query_rollouts", "status_in[0]='done'", "'succeeded'")(status_in=["done"]),
    Call("query_rollouts", "status_in='failed'", "['failed']")(status_in="failed"),
    Call("query_rollouts", "mode='training'", "did you mean 'train'?")(mode="training"),
    Call("query_workers", "status_in[0]='bsy'", "did you mean 'busy'?")(status_in=["bsy"]),
    Call("take", "mode='training'", "did you mean 'train'?")(1, consumer="c", mode="training"),
    Call("completed", "mode='training'", "did you mean 'train'?")(mode="training"),
    Call("ack", "batch=3", "pass what take() gave")(3, step=1),
    Call("release", "rollout_ids='ro-1'", "['ro-1']")("ro-1"),
    Call("update_resources", "resources['p']='hi'", "rs.ObjectResource(value=...)")("r", {"p": "hi"}),
    Call("update_resources", "resources['p']=<dict {'a'", "rs.ObjectResource(value=...)")("r", {"p": {"a": 1}}),
    Call("add_resources", "resources['w']=<ndarray", "rs.ObjectResource(value=...)")({"w": np.zeros(3)}),
    Call("add_resources", "resources=3", "{'prompt': rs.PromptTemplate(...)}")(3),
    Call("update_resources", "policy_version='v1'", "a whole number")("r", RESOURCES, policy_version="v1"),
    Call("enqueue_many_rollouts", "rollouts[0]=<dict {'q': 1}>", "EnqueueRolloutRequest(input=task)")([{"q": 1}]),
    Call("enqueue_many_rollouts", "rollouts[0]=<dict", "EnqueueRolloutRequest(input=task)")([{"task": 1}]),
    Call("enqueue_many_rollouts", "rollouts[1]='a'", "EnqueueRolloutRequest(input=task)")([REQUEST, "a"]),
    Call("enqueue_many_rollouts", "rollouts[0]['inptu']=1", "did you mean 'input'?")([{"inptu": 1}]),
    Call("enqueue_many_rollouts", "rollouts=<EnqueueRolloutRequest", "put one alone into a list")(REQUEST),
    Call("enqueue_rollout", "input=<EnqueueRolloutRequest", "enqueue_many_rollouts([request])")(REQUEST),
    Call("enqueue_rollout", "input=<list", "enqueue_many_rollouts(requests)")([REQUEST]),
    Call("enqueue_rollout", "input=<tuple", "enqueue_many_rollouts(requests)")((REQUEST,)),
    Call("enqueue_rollout", "input=<Leveled", "enqueue_many_rollouts([request])")(Leveled(input=1)),
    Call("enqueue_group", "input=<list", "enqueue_many_rollouts(requests)")([Leveled(input=1)], 2),
    Call("update_rollout", "input=<AttemptedRollout", "rollout.input")("ro", ATTEMPTED),
    Call("enqueue_group", "input=<EnqueueRolloutRequest", "enqueue_many_rollouts([request])")(REQUEST, 2),
    Call("start_rollout", "input=<Rollout", "rollout.input", "requeue")(ROLLOUT),
    Call("enqueue_many_rollouts", "rollouts[1].input=<EnqueueRolloutRequest", "pass its fields", "or it alone")(
        [REQUEST, rs.EnqueueRolloutRequest(input=REQUEST)]
    ),
    Call("enqueue_many_rollouts", "rollouts[1].config.max_attempts='x'")(
        [REQUEST, changed(config=rs.RolloutConfig().model_copy(update={"max_attempts": "x"}))]
    ),
    Call("enqueue_many_rollouts", "rollouts[0].mode='foo'", "'val'")([changed(mode="foo")]),
    Call("enqueue_many_rollouts", "rollouts[0].mode=<list", "'val'")([changed(mode=["train"])]),
    Call("enqueue_many_rollouts", "rollouts[1].priority=", "53 bits")([REQUEST, changed(priority=2**70)]),
    Call("enqueue_many_rollouts", "rollouts[0].tags['a']=None")([changed(tags={"a": None})]),
    Call("enqueue_many_rollouts", "rollouts[0]=<dict", "'input'")([rs.EnqueueRolloutRequest.model_construct()]),
    Call("enqueue_rollout", "priority=<int", "53 bits")("x", priority=2**70),
    Call("enqueue_many_rollouts", "tags['[key]']=None")([{"input": 1, "tags": {"[key]": None}}]),
    Call("enqueue_rollout", "metadata key=1", "text")("x", metadata={1: 2}),
    Call("enqueue_many_rollouts", "rollouts[0].metadata key=1", "text")([{"input": 1, "metadata": {1: 2}}]),
    Call("update_resources", "resources key=1", "text")("r", {1: rs.ObjectResource(value=1)}),
    Call("query_rollouts", "status='queuing'", "['queuing']")(status="queuing"),
    Call("query_rollouts", "status[0]='done'")(status=["done"]),
    Call("query_rollouts", "rollout_ids='ro-1'", "['ro-1']")(rollout_ids="ro-1"),
    Call("query_rollouts", "rollout_id_in='ro-1'", "['ro-1']")(rollout_id_in="ro-1"),
    Call("add_span", "span=<dict {'a': 1}>", "a Span")({"a": 1}),
    Call("add_many_spans", "spans[0]=1", "a Span")([1]),
]  # fmt: skip

#: Calls with something wrong deep within, or in a kind of their own: the remedy is not for these.
DEEP = [
    Call("enqueue_many_rollouts", "rollouts[0].tags['a']=None")([{"input": 1, "tags": {"a": None}}]),
    Call("enqueue_many_rollouts", "rollouts[0].config=5", "a RolloutConfig")([{"input": 1, "config": 5}]),
    Call("enqueue_many_rollouts", "rollouts[0].metadata=5", "a mapping")([{"input": 1, "metadata": 5}]),
    Call("update_resources", "['x'].model=5")("a", {"x": {"resource_type": "llm", "endpoint": "e", "model": 5}}),
    Call("update_resources", "['x']=<dict", "needs 'endpoint'")("a", {"x": {"resource_type": "llm"}}),
    Call("add_resources", "resources['m']=<Mine", "derive")({"m": Mine()}),
    Call("add_resources", "resources['m']=<MyLLM", "derive")({"m": MyLLM(endpoint="e", model="m")}),
]  # fmt: skip

#: Calls that do not fit; a word of the form is among what is said.
FORMS = [
    Call("enqueue_rollout", "'priorty'", "did you mean 'priority'?", "queue='default'")("x", priorty=1),
    Call("enqueue_rollout", "5 arguments by position", "got 6", "rollout_id=...")("x", None, None, None, None, "id"),
    Call("enqueue_rollout", "needs input=", "queue='default'")(),
    Call("enqueue_rollout", "'task'", "needs input=", "enqueue_rollout(input, mode=None")(task=1),
    Call("update_attempt", "needs attempt_id=", "update_attempt(rollout_id, attempt_id,")("ro", status="failed"),
    Call("update_attempt", "needs rollout_id=", "worker_id=UNSET")(attempt_id="at"),
    Call("add_span", "needs span=", "add_span(span)")(),
    Call("dequeue_rollout", "'queue'", "did you mean 'queues'?", "timeout=0.0")(queue="q"),
    Call("dequeue_rollout", "1 arguments by position", "timeout=...")("w", 5.0),
    Call("update_attempt", "'stauts'", "did you mean 'status'?", "worker_id=UNSET")("ro", "at", stauts="failed"),
    Call("add_span", "'spans'", "did you mean 'span'?", "add_span(span)")(None, spans=[]),
    Call("wait_for_rollouts", "no arguments by position", "rollout_ids=...", "timeout=None")(["ro"]),
    Call("query_rollouts", "'group'", "did you mean 'group_id'?", "status_in=None")(group="g"),
    Call("query_spans", "'contains'", "name_contains=None")("ro", contains="x"),
    Call("take", "needs consumer=", "take(n, *, consumer,")(3),
    Call("take", "'consumr'; did you mean 'consumer'? It is called as take(n, *, consumer,")(3, consumr="c"),
    Call("ack", "step=", "ack(batch, *, step, note=None)")(None),
    Call("enqueue_group", "'n' twice", "enqueue_group(input, n, *")("x", 2, n=2),
    Call("update_resources", "resources=", "update_resources(resources_id, resources, *")(RESOURCES),
    Call("as_completed", "'timout'", "did you mean 'timeout'?", "as_completed(rollout_ids, *")(["ro"], timout=1),
    Call("statistics", "no arguments by position", "statistics()")(1),
]  # fmt: skip


async def said(store: Any, call: Call, *, blocking: bool) -> Exception | None:
    """The error of a call, by await or by the blocking twin."""
    try:
        made = getattr(store.sync if blocking else store, call.method)(*call.given, **call.named)
        if inspect.isasyncgen(made):
            _ = [item async for item in made]
        elif inspect.isawaitable(made):
            await made
        elif inspect.isgenerator(made):
            list(made)
    except (TypeError, ValueError) as error:
        return error
    return None


@pytest.mark.parametrize("blocking", [False, True], ids=["await", "sync"])
@pytest.mark.parametrize(("calls", "kind"), [(VALUES, InvalidValueError), (FORMS, TypeError)], ids=["values", "forms"])
async def test_a_wrong_call_says_what_to_write(
    store: AnyStore, calls: list[Call], kind: type[InvalidValueError] | type[TypeError], blocking: bool
) -> None:
    """Value and remedy are in the message, which is of a line; nothing has changed."""
    for call in calls:
        error = await said(store, call, blocking=blocking)
        assert type(error) is kind, (call, error)
        assert all(word in str(error) for word in call.words), (call, str(error))
        assert "\n" not in str(error) and len(str(error)) < 1_000, call
    counts: Mapping[str, Any] = await store.statistics()
    assert {counts[f"total_{what}"] for what in ("rollouts", "resources", "spans")} == {0}


def test_what_is_wrong_in_a_model_is_said_by_pydantic_in_better_words() -> None:
    """Who catches pydantic's error still does; the likely field, or what is missing, is in it."""
    wrong: list[tuple[Callable[[], Any], str, str]] = [
        (lambda: UNTYPED.RolloutConfig(timeout=60), "did you mean 'timeout_seconds'?", "input_value=60"),
        (lambda: UNTYPED.RolloutConfig(max_atempts=2), "did you mean 'max_attempts'?", "retry_condition"),
        (lambda: UNTYPED.RolloutConfig(max_attempts=2, retry_condition=["fialed"]), "did you mean 'failed'?", "fialed"),
        (lambda: UNTYPED.RolloutConfig(timeout_seconds=-1), "greater than or equal to 0", "input_value=-1"),
        (lambda: UNTYPED.PromptTemplate(template="x"), "needs 'engine'", "'jinja', 'f-string' or 'poml'"),
        (lambda: UNTYPED.LLM(model="m"), "needs 'endpoint'", "text"),
        (lambda: UNTYPED.EnqueueRolloutRequest(input=1, moode="train"), "did you mean 'mode'?", "priority"),
        (lambda: UNTYPED.EnqueueRolloutRequest(input=1, config={"timeout": 1}), "config.timeout", "'timeout_seconds'"),
        (lambda: UNTYPED.Rollout(input=1, start_time=0.0), "needs 'rollout_id'", "text"),
    ]
    for make, *words in wrong:
        with pytest.raises(ValidationError) as caught:
            make()
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert caught.value.errors()[0]["type"] != "value_error"
    with pytest.raises(TypeError, match=r"write ObjectResource\(value=\.\.\.\)"):
        UNTYPED.ObjectResource(5)


class Shape(TypedDict):
    """A type of a user's with fields, which is no model."""

    a: int


@dataclass
class Plain:
    """Another."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    a: int


class Cat(BaseModel):
    """A model of a user's that is no record."""

    claws: int


class Dog(BaseModel, extra="forbid"):
    """Another, to be told from the first."""

    barks: Literal["loud", "not"]


TYPES_OF_USERS = [
    (Shape, {}, ""),
    (Plain, {"a": 1, "b": 2}, ""),
    (Plain, {}, ""),
    (dict[str, list[Shape]], {"x": [{}]}, ""),
    (dict[str, list[Dog]], {"x": [{}]}, "Dog.* needs 'barks'.*'loud' or 'not'"),
    (Mapping[str, Dog] | None, {"x": {"bark": 1}}, "did you mean 'barks'"),
    (Cat | Dog, {"paws": 4}, "Cat.* needs 'claws'"),
    (Cat | Shape, {}, "Cat.* needs 'claws'"),
    (Shape | Plain, {}, ""),
    (list[Cat | None], [{}], "Cat.* needs 'claws'"),
    (tuple[Cat, Dog], [{"claws": 1}, {}], ""),
    (Annotated[list[Annotated[int, []]], Field()], [None], ""),
    (Literal["a"] | Literal["b"], "c", ""),
    (dict[int, str], {"x": "y"}, ""),
]


@pytest.mark.parametrize(("annotation", "value", "words"), TYPES_OF_USERS, ids=str)
def test_a_users_own_types_in_a_record_are_pydantics_to_refuse(annotation: Any, value: Any, words: Any) -> None:
    """Whatever a field of a subclass is: a better word where there is one, and never another error than pydantic's."""

    class Mine(rs.Resource):
        resource_type: Literal["mine"] = "mine"
        field: annotation

    for given in ({"field": value}, {}):
        with pytest.raises(ValidationError, match=f"(?s){words if given else 'Mine needs .field.'}.*type="):
            Mine(**given)
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(annotation).validate_python(value)
    assert "argument" in str(refusal("argument", annotation, caught.value))


@pytest.mark.parametrize(
    ("alias", "words"),
    [
        (Field(alias="maxLen"), "Mine needs 'maxLen', which was not given: a whole number"),
        (Field(validation_alias="maxLen"), "Mine needs 'maxLen', which was not given: a whole number"),
        (Field(validation_alias=AliasChoices("maxLen", "max")), "maxLen"),
        (Field(validation_alias=AliasPath("lens", 0)), "lens"),
    ],
)
def test_a_field_under_another_name_is_said_by_that(alias: Any, words: str) -> None:
    """A record of a user's with aliases: they are what is given, so they are what is told."""

    class Mine(Model, extra="forbid"):
        max_len: int = alias

    with pytest.raises(ValidationError, match=words):
        Mine()
    with pytest.raises(ValidationError, match="Mine has no field 'maxlen'") as caught:
        Mine(maxlen=1)  # type: ignore[call-arg]  # wrong on purpose
    assert "did you mean 'maxLen'" in str(caught.value) or not isinstance(alias.validation_alias, str)


@pytest.mark.parametrize("make", [rs.RolloutConfig, lambda **fields: rs.EnqueueRolloutRequest(input=1, config=fields)])
def test_half_of_a_retry_is_warned_of(make: type[rs.RolloutConfig] | Callable[..., rs.EnqueueRolloutRequest]) -> None:
    """Where the user makes it, and not where both are said, nor where a store answers with one."""
    with pytest.warns(UserWarning, match=r"max_attempts=3.*retry_condition=\['failed', 'timeout'") as warned:
        make(max_attempts=3)
    assert warned[0].filename == __file__
    with pytest.warns(UserWarning, match=r"retry_condition=\['failed'\].*max_attempts=3"):
        make(retry_condition=["failed"])
    make(max_attempts=3, retry_condition=[])  # warnings are errors in tests
    make(max_attempts=1, retry_condition=["failed"])
    make(max_attempts=1)
    with rs.InMemoryLightningStore(clock="manual") as store:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = rs.RolloutConfig(max_attempts=3)
        made = store.sync.enqueue_rollout(1, config=config)
        store.sync.update_rollout(made.rollout_id, config=made.config)
        assert store.sync.get_rollout_by_id(made.rollout_id).config.max_attempts == 3


class Patient(rs.RolloutConfig):
    """A user's own, with one of the two by default."""

    max_attempts: int = 3


class Thorough(rs.RolloutConfig):
    """And with the other."""

    retry_condition: list[rs.AttemptStatus] = Field(default=["failed"])


class Counted(rs.RolloutConfig):
    """And with arguments of its own."""

    def __init__(self, n: int) -> None:
        super().__init__(max_attempts=n, retry_condition=["failed"])


def test_a_retry_that_a_subclass_completes_is_not_warned_of(make_memory_store: MakeMemoryStore) -> None:
    """What was made is looked at, not what was given; a subclass that is half of one is still told."""
    store = make_memory_store()
    made = [
        Patient(retry_condition=["failed"]),
        Thorough(max_attempts=3),
        Counted(3),
        Counted(1),
        Counted.model_validate({"n": 3}),
        Counted.model_validate_json('{"n": 3}'),
        Thorough.model_validate({"max_attempts": 2}),
        Thorough(max_attempts=1),
        Patient(retry_condition=[]),
    ]
    for config in made:  # warnings are errors in tests
        assert store.sync.enqueue_rollout(1, config=config).config.max_attempts == config.max_attempts
    for make, words in ((Patient, r"max_attempts=3\) tries nothing"), (Thorough, r"\['failed'\]\) tries nothing")):
        with pytest.warns(UserWarning, match=words):
            make()


def test_what_a_model_hides_stays_hidden() -> None:
    """A user's own with secrets in it: better words show no value that pydantic would not."""

    class Secret(Model, extra="forbid", hide_input_in_errors=True):
        api_key: str = ""

    with pytest.raises(ValidationError, match="did you mean 'api_key'") as caught:
        Secret(api_kay="sk-123")  # type: ignore[call-arg]  # wrong on purpose
    assert "sk-123" not in str(caught.value)


@pytest.mark.parametrize("cls", [rs.RolloutConfig, Patient], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    ("field", "value"), [("max_attempts", "x"), ("timeout_seconds", -5), ("retry_condition", "failed")]
)
def test_a_config_that_was_changed_is_checked_wherever_it_goes(
    make_memory_store: MakeMemoryStore, cls: type[rs.RolloutConfig] | type[Patient], field: str, value: str | int
) -> None:
    """Assignment takes anything, so each way in looks again, a store's default among them."""
    config = cls(max_attempts=2, retry_condition=["failed"])
    setattr(config, field, value)
    store = make_memory_store()
    kept = store.sync.enqueue_rollout(1)
    ways: dict[str, Callable[[], Any]] = {
        "default_config": lambda: rs.InMemoryLightningStore(default_config=config),
        "config": lambda: store.sync.enqueue_rollout(1, config=config),
        " config": lambda: store.sync.update_rollout(kept.rollout_id, config=config),
    }
    for name, way in ways.items():
        with pytest.raises(InvalidValueError) as caught:
            way()
        assert caught.value.args[0] == f"{name.strip()}.{field}"
    assert store.sync.get_rollout_by_id(kept.rollout_id).config == rs.RolloutConfig()
    config = cls(max_attempts=2, retry_condition=["failed"])
    with rs.InMemoryLightningStore(default_config=config) as other:
        assert other.sync.enqueue_rollout(1).config == rs.RolloutConfig(**config.model_dump())


def test_functions_say_how_they_are_called(make_memory_store: MakeMemoryStore) -> None:
    """Stores, pools and the ways to them, likewise."""
    store = make_memory_store()
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: UNTYPED.start(durabilty="power"), "start() has no argument 'durabilty'; did you mean 'durability'?"),
        (lambda: UNTYPED.connect("a", "b"), "connect() takes 1 arguments by position"),
        (lambda: UNTYPED.recover(), "recover() needs path="),
        (lambda: UNTYPED.stop(nmae="x"), "stop() has no argument 'nmae'; did you mean 'name'?"),
        (lambda: UNTYPED.InMemoryLightningStore("train"), "takes no arguments by position"),
        (lambda: UNTYPED.InMemoryLightningStore(journl="x"), "InMemoryLightningStore() has no argument 'journl'"),
        (lambda: UNTYPED.RunnerPool(store, len, sise=2), "RunnerPool() has no argument 'sise'; did you mean 'size'?"),
        (lambda: UNTYPED.RunnerPool(store), "RunnerPool() needs agent="),
        (lambda: UNTYPED.run_one(lambda task, ctx: 1.0, 1, resource={}), "did you mean 'resources'?"),
    ]
    for call, words in wrong:
        with pytest.raises(TypeError) as caught:
            call()
        assert words in str(caught.value) and "It is called as" in str(caught.value)


def test_methods_stay_what_they_are() -> None:
    """Kind, signature and text of each method are the contract's, whatever it costs to explain a wrong call."""
    for name in METHODS:
        ours, theirs = getattr(StoreClient, name), getattr(LightningStore, name)
        assert inspect.signature(ours) == inspect.signature(theirs), name
        assert inspect.iscoroutinefunction(ours) or not inspect.iscoroutinefunction(theirs), name
        assert ours.__name__ == name and (ours.__doc__ == theirs.__doc__), name


@pytest.mark.parametrize("model", [rs.RolloutConfig, rs.EnqueueRolloutRequest, rs.LLM, Leveled, Mine, Counted])
def test_models_show_the_fields_that_they_take(model: Any) -> None:
    """By name, and nothing else; one with arguments of its own shows those."""
    shown = inspect.signature(model).parameters
    assert list(shown) == (["n"] if model is Counted else list(model.model_fields))
    assert model is Counted or {one.kind for one in shown.values()} == {inspect.Parameter.KEYWORD_ONLY}


def test_an_error_of_the_function_itself_stays() -> None:
    """Only a call that never began is explained."""

    @explained
    def function(values: list[Any]) -> Any:
        return values + 1  # type: ignore[operator]  # wrong on purpose

    with pytest.raises(TypeError, match="can only concatenate"):
        function([])
    with pytest.raises(TypeError, match=r"function\(\) needs values=.*It is called as function\(values\)"):
        function()  # type: ignore[call-arg]  # wrong on purpose


async def test_a_remedy_is_given_where_it_helps(make_memory_store: MakeMemoryStore) -> None:
    """What is wrong within an item is no matter of wrapping it, or giving it a name."""
    for call in DEEP:
        error = await said(make_memory_store(), call, blocking=False)
        assert type(error) is InvalidValueError, (call, error)
        assert all(word in str(error) for word in call.words), (call, str(error))
        assert "wrap each task" not in str(error) and "give each its name" not in str(error), str(error)


async def test_an_empty_batch_is_no_batch(store: AnyStore) -> None:
    """What is said of it fits: nothing was taken."""
    batch = await store.take(1, consumer="c")
    with pytest.raises(rs.BatchConflictError, match=r"if batch\.rollouts"):
        await store.ack(batch, step=1)


async def test_a_resource_that_is_not_there(
    make_memory_store: MakeMemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    """The agent is told which there are, and how there would be others; a KeyError it is."""

    def agent(task: Any, ctx: rs.Context) -> Any:
        return ctx.resources["prompt"]

    with pytest.raises(KeyError, match="'promt'.*pass resources=.*did you mean 'promt'") as caught:
        rs.run_one(agent, 1, {"promt": rs.ObjectResource(value=1)})
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(rs.NoSuchResourceError, match="It is empty"):
        rs.run_one(agent, 1)
    store = make_memory_store()
    async with rs.RunnerPool(store, agent, size=1):
        first = await store.enqueue_rollout(1)
        await store.wait_for_rollout(first.rollout_id, timeout=20)
        await store.update_resources("policy", {"main": rs.ObjectResource(value=1)})
        second = await store.enqueue_rollout(1)
        await store.wait_for_rollout(second.rollout_id, timeout=20)
    errors = [present(present(await store.get_latest_attempt(r.rollout_id)).error) for r in (first, second)]
    assert "nothing had been published" in errors[0] and "update_resources" in errors[0]
    assert "It has 'main': version 1 of 'policy'" in errors[1]
    assert f"{__file__}:" in caplog.text  # where the agent asked


async def test_a_success_without_a_reward_is_told_once(
    make_memory_store: MakeMemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    """With how to give one; whatever way a reward was given, nothing is said."""

    def none(task: Any, ctx: rs.Context) -> None:
        return None

    def given(task: Any, ctx: rs.Context) -> None:
        ctx.reward(0.5)

    def sent(task: Any, ctx: rs.Context) -> None:
        with ctx.span("graded", **{"agentlightning.reward.0.value": 0.5}):
            pass

    store = make_memory_store()
    for agent, times in ((given, 0), (sent, 0), (lambda task, ctx: 0.0, 0), (none, 1)):
        caplog.clear()
        async with rs.RunnerPool(store, agent, size=1):
            made = await store.enqueue_many_rollouts([REQUEST] * 3)
            await store.wait_for_rollouts(rollout_ids=[r.rollout_id for r in made], timeout=20)
        assert caplog.text.count("succeeded without a reward") == times, agent
    assert "ctx.reward(x)" in caplog.text and "rs.Drop" in caplog.text


async def test_as_completed_of_what_never_existed_blocking(store: AnyStore) -> None:
    """The blocking twin raises it, too."""
    done = await claim(store)
    await store.update_rollout(done.rollout_id, status="succeeded")
    with pytest.raises(rs.RolloutNotFoundError, match="Rollout nope not found.*enqueued"):
        list(store.sync.as_completed([done.rollout_id, "nope"]))


def test_a_journal_that_cannot_be(tmp_path: Path) -> None:
    """A file in the place of the directory, or of one above it, and what is no path: told before anything is made."""
    file = tmp_path / "run.journal"
    file.write_text("mine")
    for path in (file, file / "below", file / "far" / "below"):
        for way in (lambda p: rs.InMemoryLightningStore(journal=p), lambda p: rs.start(journal=p), rs.recover):
            with pytest.raises(InvalidValueError, match=f"{file} is a file; name the directory") as caught:
                way(path)
            assert caught.value.args[:2] == ("journal", str(path))
    no_paths: list[Any] = [3, "", "a\0b"]
    for no_path in no_paths:
        with pytest.raises(InvalidValueError, match="the path of a directory"):
            rs.InMemoryLightningStore(journal=no_path)
    with pytest.raises(InvalidValueError, match=r"journal='/proc/nope/run'.*can be made \(No such file"):
        rs.InMemoryLightningStore(journal="/proc/nope/run")
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("refused", [0o500, 0o000], ids=["no writing", "nothing"])
def test_a_journal_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int) -> None:
    """Whose directory it is not is told so; root may do anything, so that the system's answer is made up."""
    rights = {"/": 7, str(tmp_path): refused >> 6}
    monkeypatch.setattr("os.access", lambda path, mode: (rights.get(str(path), 7) & mode) == mode)
    with pytest.raises(InvalidValueError, match=f"{tmp_path} may not be written; change its rights"):
        rs.InMemoryLightningStore(journal=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


async def test_a_store_of_ones_own_hears_of_the_form_of_the_contract() -> None:
    """Whatever form its method has, which hands on what it is given."""

    class Logged(rs.InMemoryLightningStore):
        async def enqueue_rollout(self, *given: Any, **named: Any) -> rs.Rollout:
            return await super().enqueue_rollout(*given, **named)

    with Logged() as store:
        assert (await store.enqueue_rollout("x", mode="train")).mode == "train"
        with pytest.raises(
            TypeError, match=r"no argument 'mod'; did you mean 'mode'\? It is called as enqueue_rollout\(input"
        ):
            await store.enqueue_rollout("x", mod="train")
