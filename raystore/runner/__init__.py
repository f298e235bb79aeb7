"""Runners: processes that claim rollouts, run an agent on them and report the result.

`pool` keeps a number of runners alive, in this process or on Ray (`actors`). `worker` is one runner, `context` is the
agent's view of its rollout, `agents` calls an agent and tells how the call ends, and `life` has its thread and task. An
agent runs in its runner's process (`inline_agents`, which also has `run_one`) or in one of its own (`process_agents`,
`fork_server`). `otel` takes the spans that an agent makes with OpenTelemetry's SDK.
"""

from raystore.runner.context import Context as Context
from raystore.runner.context import current as current
from raystore.runner.inline_agents import Run as Run
from raystore.runner.inline_agents import run_one as run_one
from raystore.runner.pool import RunnerPool as RunnerPool
