"""Runners: processes that claim rollouts, run an agent on them and report the result.

`pool` keeps a number of runners alive: `actors` on Ray, `local_runners` in this process. `worker` is one runner,
`context` what an agent sees of its rollout, `agents` what an agent is and how a call ends, `agent_errors` the texts of
its errors, and `life` its thread and task. An agent runs in its runner's process (`inline_agents`) or in one of its own
(`process_agents`, `fork_server`, `agent_process`, `process_tree`), or once without a store (`run_one`).
Not here: algorithms, which are plain async functions over a store.
"""

from raystore.runner.context import Context as Context
from raystore.runner.context import current as current
from raystore.runner.pool import RunnerPool as RunnerPool
from raystore.runner.run_one import Run as Run
from raystore.runner.run_one import run_one as run_one
