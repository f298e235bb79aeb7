"""Runners: processes that claim rollouts, run an agent on them and report.

`pool` keeps a number of them alive (`actors` on Ray, `local_runners` in this process), `worker` is what each one does,
`agents` says what an agent is, `life` in which thread and task it lives, `context` what it sees and `told` what is
said of its errors. It runs in its runner's process (`inline_agents`) or in one of its own (`process_agents`,
`fork_server`, `agent_process`), or once and without a store (`run_one`).
Not here: algorithms, which are plain async functions over a store.
"""

from raystore.runner.context import Context as Context
from raystore.runner.context import current as current
from raystore.runner.pool import RunnerPool as RunnerPool
from raystore.runner.run_one import Run as Run
from raystore.runner.run_one import run_one as run_one
