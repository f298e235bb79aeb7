"""Runners: processes that claim rollouts, run an agent on them and report.

`pool` keeps a number of them alive, `worker` is what each one does, `context` is what an agent sees.
Not here: algorithms, which are plain async functions over a store.
"""

from raystore.runner.context import Context as Context
from raystore.runner.context import current as current
from raystore.runner.pool import RunnerPool as RunnerPool
