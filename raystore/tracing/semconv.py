"""Names of span attributes, in one place: OpenTelemetry's GenAI names, ours where it has none, and everybody else's.

The GenAI conventions (`gen_ai.*`) have no names for token ids and log-probabilities, which RL needs; those below
continue their scheme. What other tracers call the same is the table at the end.
Not here: how a place is read (`raystore.tracing`), what is done with it (`triplets`, `trajectories`).
"""

from __future__ import annotations

OPERATION = "gen_ai.operation.name"  #: "chat", "text_completion", "embeddings", "execute_tool", ...
REQUEST_MODEL = "gen_ai.request.model"
RESPONSE_MODEL = "gen_ai.response.model"
RESPONSE_ID = "gen_ai.response.id"
FINISH_REASONS = "gen_ai.response.finish_reasons"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
INPUT_MESSAGES = "gen_ai.input.messages"
OUTPUT_MESSAGES = "gen_ai.output.messages"
SYSTEM_INSTRUCTIONS = "gen_ai.system_instructions"
AGENT_NAME = "gen_ai.agent.name"  #: of the agent that a span belongs to: the role of a trajectory

# Ours, in the scheme of the above: packed arrays.
INPUT_TOKEN_IDS = "gen_ai.input.token_ids"
OUTPUT_TOKEN_IDS = "gen_ai.output.token_ids"
OUTPUT_LOGPROBS = "gen_ai.output.logprobs"  #: of the output tokens, natural logarithm

POLICY_VERSION = "raystore.policy_version"  #: of the weights that the attempt was claimed with

# -- the dialects: where tracers write the same things, best first -----------------------------------------------------
#
# A place is a path: names joined by dots, numbers for items, `*` for any one name. It leads through attributes that
# were flattened ("choices.0.token_ids"), and through text that is JSON or a Python literal, alike.
_WEAVE_REQUEST = "agentlightning.operation.input"  # agent-lightning 0.3 with Weave: request and answer, flattened
_WEAVE = "agentlightning.operation.output"
_OPENINFERENCE = "output.value"  # OpenInference: the answer, as one JSON text
_LITELLM = "llm.*"  # LiteLLM's "raw_gen_ai_request": `llm.<provider>.<field>` of request and answer, as Python's text
_ANSWERS = (_WEAVE, _OPENINFERENCE, _LITELLM)  # of OpenAI's API, as vLLM extends it
ANSWERS = tuple(answer.rstrip("*") for answer in _ANSWERS)  #: how the names begin of attributes that hold answers

PLACES: dict[str, tuple[str, ...]] = {
    "prompt_ids": (
        INPUT_TOKEN_IDS,
        "prompt_token_ids",  # agent-lightning 0.2 and 0.3 with AgentOps
        *(f"{answer}.prompt_token_ids" for answer in _ANSWERS),
    ),
    "response_ids": (
        OUTPUT_TOKEN_IDS,
        "response_token_ids",  # agent-lightning 0.2 and 0.3 with AgentOps
        *(f"{answer}.response_token_ids" for answer in _ANSWERS),  # agent-lightning's patch of vLLM: one list a choice
        *(f"{answer}.choices.0.token_ids" for answer in _ANSWERS),  # vLLM from 0.10.2 on
        *(f"{answer}.choices.0.provider_specific_fields.token_ids" for answer in _ANSWERS),  # the same behind LiteLLM
    ),
    "logprobs": (
        OUTPUT_LOGPROBS,
        "logprobs.content",  # agent-lightning 0.3 with AgentOps: OpenAI's items, as JSON
        *(f"{answer}.choices.0.logprobs.content" for answer in _ANSWERS),
        *(f"{answer}.choices.0.logprobs.token_logprobs" for answer in _ANSWERS),  # of the older completions
    ),
    "response_id": (RESPONSE_ID, *(f"{answer}.id" for answer in _ANSWERS)),
    "model": (
        RESPONSE_MODEL,
        REQUEST_MODEL,
        "llm.model_name",  # OpenInference
        *(f"{answer}.model" for answer in _ANSWERS),
    ),
    "finish_reason": (
        f"{FINISH_REASONS}.0",
        "gen_ai.completion.0.finish_reason",  # AgentOps, older OpenLLMetry (Traceloop)
        "llm.finish_reason",  # OpenInference
        *(f"{answer}.choices.0.finish_reason" for answer in _ANSWERS),
    ),
    "messages": (
        INPUT_MESSAGES,
        "gen_ai.prompt",  # OpenTelemetry's first form, indexed; AgentOps, older OpenLLMetry
        "llm.input_messages",  # OpenInference, indexed
        f"{_WEAVE_REQUEST}.messages",
        "input.value.messages",  # OpenInference
        f"{_LITELLM}.messages",
    ),
    "answer": (
        OUTPUT_MESSAGES,
        "gen_ai.completion",
        "llm.output_messages",
        *(f"{answer}.choices" for answer in _ANSWERS),
    ),
}

#: What says that a span is the call of a language model: any of these attributes with one of these values.
MODEL_CALLS: dict[str, frozenset[str]] = {
    OPERATION: frozenset({"chat", "text_completion", "generate_content"}),
    "gen_ai.request.type": frozenset({"chat", "completion"}),  # AgentOps
    "llm.request.type": frozenset({"chat", "completion"}),  # older OpenLLMetry, LiteLLM
    "openinference.span.kind": frozenset({"LLM"}),
    f"{_WEAVE}.object": frozenset({"chat.completion", "text_completion"}),
}
RAW_REQUEST = "raw_gen_ai_request"  #: name of LiteLLM's spans with the provider's own request and answer

#: Events of a span that are one message each, until OpenTelemetry made them attributes; and those that hold them all.
MESSAGE_EVENTS = {
    "gen_ai.system.message": "system",
    "gen_ai.user.message": "user",
    "gen_ai.assistant.message": "assistant",
    "gen_ai.tool.message": "tool",
}
CHOICE_EVENT = "gen_ai.choice"
DETAIL_EVENTS = frozenset(
    {"gen_ai.client.inference.operation.details", "gen_ai.content.prompt", "gen_ai.content.completion"}
)

#: Who acts: attribute and value that a span must have (None: any span), and the attribute with the agent's name (None:
#: the name of the span).
AGENTS: tuple[tuple[tuple[str, str] | None, str | None], ...] = (
    (None, AGENT_NAME),
    (None, "agent.name"),  # OpenAI's agents with AgentOps; OpenInference
    (("agentops.span.kind", "agent"), "operation.name"),
    (("traceloop.span.kind", "agent"), "traceloop.entity.name"),
    (None, "recipient_agent_type"),  # AutoGen
    (None, "langchain.chain.type"),  # LangGraph with AgentOps
    (None, "executor.id"),  # Microsoft's agent framework
    (("type", "agent"), f"{_WEAVE_REQUEST}.name"),
    (("openinference.span.kind", "AGENT"), None),
)

REWARD_SPAN = "agentlightning.annotation"  #: name of spans that carry a reward
REWARD_PREFIX = "agentlightning.reward."  #: attribute `<prefix><i>.name` and `<prefix><i>.value`; 0 is the primary one
PRIMARY_REWARD = f"{REWARD_PREFIX}0.value"  #: on a span of any name: agent-lightning 0.3, `ctx.reward`
#: What agent-lightning's decorator `reward` leaves with AgentOps: `{"type": "reward", "value": 0.5}`, as JSON.
REWARD_OUTPUTS = ("agentops.task.output", "agentops.entity.output")
LEGACY_REWARD = "reward"  #: agent-lightning 0.2, on spans of these names:
REWARD_SPANS = frozenset({REWARD_SPAN, "agentlightning.reward"})
