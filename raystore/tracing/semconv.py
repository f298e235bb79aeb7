"""Names of span attributes: OpenTelemetry's GenAI names, raystore's where it has none, and a table of other tracers'.

The GenAI conventions (`gen_ai.*`) have no names for token ids and log-probabilities, which RL needs; those below
continue their scheme. A tracer with names of its own is a line in the tables, and no code.
"""

from __future__ import annotations

OPERATION: str = "gen_ai.operation.name"  #: "chat", "text_completion", "embeddings", "execute_tool", ...
REQUEST_MODEL: str = "gen_ai.request.model"
RESPONSE_MODEL: str = "gen_ai.response.model"
RESPONSE_ID: str = "gen_ai.response.id"
FINISH_REASONS: str = "gen_ai.response.finish_reasons"
#: How names of sampling parameters begin: OpenTelemetry's, OpenInference's, OpenLLMetry's, Weave's, and plain ones.
SAMPLING: tuple[str, ...] = (
    "gen_ai.request.temperature", "gen_ai.request.top_p", "gen_ai.request.top_k", "gen_ai.request.seed",
    "gen_ai.request.max_tokens", "llm.invocation_parameters", "llm.request.temperature", "llm.top_p",
    "agentlightning.operation.input.temperature", "agentlightning.operation.input.top_p", "temperature", "top_p",
)  # fmt: skip
INPUT_TOKENS: str = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: str = "gen_ai.usage.output_tokens"
#: Where tracers say how many tokens prompt and response have, if they do: OpenTelemetry now and earlier, OpenInference.
PROMPT_SIZES: tuple[str, ...] = (INPUT_TOKENS, "gen_ai.usage.prompt_tokens", "llm.token_count.prompt")
RESPONSE_SIZES: tuple[str, ...] = (OUTPUT_TOKENS, "gen_ai.usage.completion_tokens", "llm.token_count.completion")
INPUT_MESSAGES: str = "gen_ai.input.messages"
OUTPUT_MESSAGES: str = "gen_ai.output.messages"
SYSTEM_INSTRUCTIONS: str = "gen_ai.system_instructions"
AGENT_NAME: str = "gen_ai.agent.name"  #: of the agent that a span belongs to: the role of a trajectory

# raystore's own, in the same scheme.
INPUT_TOKEN_IDS: str = "gen_ai.input.token_ids"  #: token ids of the prompt, a packed array
OUTPUT_TOKEN_IDS: str = "gen_ai.output.token_ids"  #: token ids of the response, a packed array
OUTPUT_LOGPROBS: str = "gen_ai.output.logprobs"  #: natural logarithms of the response tokens' probabilities, packed

POLICY_VERSION: str = "raystore.policy_version"  #: of the weights that the attempt was claimed with

# -- the dialects: the places where tracers write a fact, the best first -----------------------------------------------
#
# A place is a path: names joined by dots, numbers for items, `*` for any one name. It leads through attributes that
# were flattened ("choices.0.token_ids") and through texts that are JSON or a Python literal.
_WEAVE_REQUEST = "agentlightning.operation.input"  # agent-lightning 0.3 with Weave: request and answer, flattened
_WEAVE = "agentlightning.operation.output"
_OPENINFERENCE = "output.value"  # OpenInference: the answer, as one JSON text
_LITELLM = "llm.*"  # LiteLLM's "raw_gen_ai_request": `llm.<provider>.<field>` of request and answer, as Python's text
_ANSWERS = (_WEAVE, _OPENINFERENCE, _LITELLM)  # of OpenAI's API, as vLLM extends it
ANSWERS: tuple[str, ...] = tuple(answer.rstrip("*") for answer in _ANSWERS)  #: prefixes of attributes with answers

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

#: A span is the call of a language model if it has any of these attributes with one of these values.
MODEL_CALLS: dict[str, frozenset[str]] = {
    OPERATION: frozenset({"chat", "text_completion", "generate_content"}),
    "gen_ai.request.type": frozenset({"chat", "completion"}),  # AgentOps
    "llm.request.type": frozenset({"chat", "completion"}),  # older OpenLLMetry, LiteLLM
    "openinference.span.kind": frozenset({"LLM"}),
    f"{_WEAVE}.object": frozenset({"chat.completion", "text_completion"}),
}
RAW_REQUEST: str = "raw_gen_ai_request"  #: name of LiteLLM's spans with the provider's own request and answer

#: Events of a span that are one message each, by role: OpenTelemetry's form before messages were attributes.
MESSAGE_EVENTS: dict[str, str] = {
    "gen_ai.system.message": "system",
    "gen_ai.user.message": "user",
    "gen_ai.assistant.message": "assistant",
    "gen_ai.tool.message": "tool",
}
CHOICE_EVENT: str = "gen_ai.choice"  #: the event of an answer, in the same form
#: Events of a span that hold all messages.
DETAIL_EVENTS: frozenset[str] = frozenset(
    {"gen_ai.client.inference.operation.details", "gen_ai.content.prompt", "gen_ai.content.completion"}
)

#: The name of the agent of a span: an attribute and the value that the span must have (None: any span), and the
#: attribute with the agent's name (None: the name of the span).
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

REWARD_SPAN: str = "agentlightning.annotation"  #: name of spans that carry a reward
REWARD_PREFIX: str = "agentlightning.reward."  #: attributes `<prefix><i>.name` and `<prefix><i>.value`, 0 the primary
PRIMARY_REWARD: str = f"{REWARD_PREFIX}0.value"  #: on a span of any name: agent-lightning 0.3, `ctx.reward`
#: Attributes of AgentOps under agent-lightning's decorator `reward`: `{"type": "reward", "value": 0.5}`, as JSON.
REWARD_OUTPUTS: tuple[str, str] = ("agentops.task.output", "agentops.entity.output")
LEGACY_REWARD: str = "reward"  #: agent-lightning 0.2's attribute, on spans of these names:
REWARD_SPANS: frozenset[str] = frozenset({REWARD_SPAN, "agentlightning.reward"})
