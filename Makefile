# Every target makes what it needs: a clean clone, Python 3.11 or newer, and `make demo`.
PYTHON ?= python3
BIN := .venv/bin
# A cluster that someone else runs on this machine is never joined by accident.
LOCAL := RAY_ADDRESS=local

.PHONY: demo examples example-transformer test test-faults test-examples test-long test-agentlightning test-tracers faults fuzz test-ray-oldest bench bench-long bench-peers reference lint clean

demo: .venv/installed
	@$(LOCAL) $(BIN)/python examples/01_prompt_bandit.py $(ARGS)

# All training loops but the one that needs torch; each fails if it did not do what it says.
TRANSFORMER := examples/08_transformer_grpo.py

examples: .venv/installed
	@set -e; for example in $(filter-out $(TRANSFORMER),$(sort $(wildcard examples/0*.py))); do \
		$(LOCAL) $(BIN)/python $$example $(ARGS); done

# A transformer that learns by GRPO, in an environment with torch; `make example-transformer ARGS=--quick` is shorter.
example-transformer: .venv-torch/installed
	@$(LOCAL) .venv-torch/bin/python $(TRANSFORMER) $(ARGS)

# Two files at a time, since most tests wait for processes; the slow ones begin. A run that crashes an interpreter ends.
PYTEST := $(LOCAL) $(BIN)/python -m pytest
TWO := -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0
FAULTS := tests/faults
EXAMPLES := tests/test_examples.py

test: lint
	$(PYTEST) $(TWO) --durations 20 --ignore $(FAULTS) --ignore $(EXAMPLES)

# The fault suite in its short form. What has bounds of milliseconds runs alone.
QUIET := $(FAULTS)/test_load.py

test-faults: .venv/installed
	$(PYTEST) $(TWO) $(FAULTS) --ignore $(QUIET)
	$(PYTEST) $(QUIET)

# A short form of each example, on a Ray of its own.
test-examples: .venv/installed
	$(PYTEST) $(EXAMPLES)

test-long: .venv/installed
	$(PYTEST) -m long

# The store in process in lock-step with agentlightning's, in an environment of its own; `make test-agentlightning
# STEPS=100000` is its long form.
STEPS ?= 8000

test-agentlightning: .venv-agentlightning/installed
	LOCKSTEP_STEPS=$(STEPS) .venv-agentlightning/bin/python -m pytest -c tests/lockstep/pytest.ini --rootdir . \
		--confcutdir tests/lockstep tests/lockstep $(ARGS)

# Spans of people's tracers, made by the libraries themselves, in two environments of their own; each test is skipped in
# the one that has not its library.
TRACERS := -m pytest -c tests/tracers/pytest.ini --rootdir . --confcutdir tests/tracers tests/tracers

test-tracers: .venv-agentlightning/installed .venv-tracers/installed
	.venv-tracers/bin/python $(TRACERS)
	.venv-agentlightning/bin/python $(TRACERS)

# The fault suite in its long form; each row adds a line to runs/faults.jsonl.
faults: .venv/installed
	$(LOCAL) FAULTS=long $(BIN)/python -m pytest -m fault -s

# Random operations of every verb, replayed; ten thousand histories take a quarter of an hour.
fuzz: .venv/installed
	$(BIN)/python -m tests.journal.fuzz $(or $(SEEDS),0 10000)

# The oldest Ray of the range in pyproject.toml, in an environment of its own.
test-ray-oldest: .venv-oldest/installed
	$(LOCAL) .venv-oldest/bin/python -m pytest tests/ray

# What the store costs, as one table; `make bench ARGS="--quick"`, `make bench ARGS="--only 1,7 --json bench.json"`.
bench: .venv/installed
	@$(LOCAL) $(BIN)/python -m benchmarks $(ARGS)

bench-long: .venv/installed
	@$(LOCAL) $(BIN)/python -m benchmarks --only 19,23 --long $(ARGS)

# What the benchmarks compare with, in an environment of its own; `make bench` finds it there.
bench-peers: .venv-agentlightning/installed

# docs/api.md, from the docstrings.
reference: .venv/installed
	$(BIN)/python -m tools.reference
	$(BIN)/python -m tools.kinds

# Also that any type checker knows the type of every public name, and infers no other.
lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@PATH="$(CURDIR)/$(BIN):$$PATH" basedpyright --verifytypes raystore --ignoreexternal > .venv/types || { cat .venv/types; exit 1; }

.venv/installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv (a minute or so, once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,examples]'
	@touch $@

.venv-oldest/installed: pyproject.toml
	@test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,examples]' 'ray[default]==2.49.*'
	@touch $@

.venv-agentlightning/installed: pyproject.toml
	@test -x .venv-agentlightning/bin/python || $(PYTHON) -m venv .venv-agentlightning
	@echo "Installing agentlightning into .venv-agentlightning (some minutes, once) ..."
	@.venv-agentlightning/bin/python -m pip install --quiet --disable-pip-version-check \
		-e . 'agentlightning==0.3.*' 'pytest>=8' 'hypothesis>=6.100'
	@touch $@

# The pins are what opentelemetry-instrumentation-openai-v2 needs and does not say.
.venv-tracers/installed: pyproject.toml
	@test -x .venv-tracers/bin/python || $(PYTHON) -m venv .venv-tracers
	@echo "Installing tracers into .venv-tracers (a minute or so, once) ..."
	@.venv-tracers/bin/python -m pip install --quiet --disable-pip-version-check -e '.[otel]' 'pytest>=8' \
		'openai>=2,<3' httpx 'wrapt<2' 'opentelemetry-instrumentation-openai>=0.60' openinference-instrumentation-openai \
		'opentelemetry-instrumentation-openai-v2==2.4b0' 'opentelemetry-util-genai==0.4b0'
	@touch $@

# Measured: the build for the CPU, and all that is beside torch. Those of CUDA are what pip shows of PyPI's files (torch
# 526.6 MB, cuDNN 366.2 MB, NCCL 206 MB, cuSPARSELt 170.1 MB, and a dozen more), and roughly their sum.
.venv-torch/installed: pyproject.toml
	@echo "Installing torch 2.13.0 into .venv-torch, once. What pip downloads, beside 120 MB of ray, numpy and others:"
	@echo "  Linux on x86_64, from PyPI: a build for CUDA of 530 MB, and about 2 GB of CUDA's libraries, unused here"
	@echo "  Linux on x86_64, built for the CPU: 190 MB (1.3 GB once installed). You get it by stopping this with Ctrl+C and"
	@echo "    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make example-transformer"
	@test -x .venv-torch/bin/python || $(PYTHON) -m venv .venv-torch
	@.venv-torch/bin/python -m pip install --quiet --disable-pip-version-check -e '.[torch]'
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-agentlightning .venv-tracers .venv-torch .pytest_cache .mypy_cache .ruff_cache .hypothesis runs
