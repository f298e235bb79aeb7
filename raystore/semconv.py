"""Names of span attributes, in one place: OpenTelemetry's GenAI names, and ours where it has none.

The GenAI conventions (`gen_ai.*`) have no names for token ids and log-probabilities, which RL needs; those below
continue their scheme. The reward's names are the contract's (`raystore.spans`).
Not here: what is done with them (`raystore.runner.context` writes, `raystore.triplet` reads).
"""

from __future__ import annotations

OPERATION = "gen_ai.operation.name"  #: "chat", "text_completion", "embeddings", "execute_tool", ...
REQUEST_MODEL = "gen_ai.request.model"
RESPONSE_MODEL = "gen_ai.response.model"
FINISH_REASONS = "gen_ai.response.finish_reasons"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
INPUT_MESSAGES = "gen_ai.input.messages"
OUTPUT_MESSAGES = "gen_ai.output.messages"

# Ours, in the scheme of the above: packed arrays.
INPUT_TOKEN_IDS = "gen_ai.input.token_ids"
OUTPUT_TOKEN_IDS = "gen_ai.output.token_ids"
OUTPUT_LOGPROBS = "gen_ai.output.logprobs"  #: of the output tokens, natural logarithm

POLICY_VERSION = "raystore.policy_version"  #: of the weights that the attempt was claimed with

# What agent-lightning's tracers call the same.
LEGACY_INPUT_TOKEN_IDS = "prompt_token_ids"
LEGACY_OUTPUT_TOKEN_IDS = "response_token_ids"
