# All commands for this code, for people and for CI. `make` without a target lists them.

PYTHON ?= python3
CARGO ?= cargo
# The release profile everywhere, also for lints and documentation, so that dependencies, build
# scripts and macros are built only once.
PROFILE := --release --locked
TARGET := $(or $(CARGO_TARGET_DIR),target)
VENV := $(TARGET)/venv/bin/python
PYTEST := $(VENV) -m pytest -c tests/python/pytest.ini --rootdir tests/python
VENV_DEPLOY := $(TARGET)/venv-deploy/bin/python
VENV_CLIENTS := $(TARGET)/venv-clients/bin/python
VENV_LLAMAINDEX := $(TARGET)/venv-llamaindex/bin/python
CLIENTS_PYTEST := -m pytest -c tests/clients/pytest.ini --rootdir tests/clients
# What the foreign suites and clients speak to: the release binary; V1_TARGET=upstream, the scripted
# upstream itself; or V1_BASE_URL with V1_KEY, a running service.
V1_BUILT := $(if $(V1_BASE_URL)$(V1_TARGET),,build)
VENV_LITELLM := $(abspath $(TARGET))/venv-litellm/bin/python
BENCH ?=
KILL_ROUNDS ?= 50
FAULT_ROUNDS ?= 10
V1_CALLS ?= 10000
V1_CANCELLED ?= 1000
BUDGET_KILLS ?= 100
FUZZ_SECONDS ?= 60
FUZZ ?=
# Suites that need only the address of a service, and so run unchanged on replicas.
SAME_ON_REPLICAS := $(addprefix tests/python/test_,recorded_errors.py simplejwt.py metrics.py schema.py secrecy.py undisturbed.py attacks_logins.py)

.PHONY: help run build fmt check test test-rust test-service soak fuzz bench bench-engine bench-search bench-store bench-budgets bench-streams bench-gateway bench-service bench-posts test-servers python-env test-deploy python-env-deploy test-litellm test-v1 test-prices test-replicas bench-replicas bench-import bench-move python-env-litellm python-env-clients python-env-llamaindex test-llm-comply test-openai-python test-langchain test-clients

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

run: ## start the service on http://127.0.0.1:8000, with its data in ./data
	$(CARGO) run $(PROFILE)

build: ## build the release binary
	$(CARGO) build $(PROFILE)

fmt: ## format the Rust code
	$(CARGO) fmt --all
	$(CARGO) fmt --manifest-path fuzz/Cargo.toml

check: ## formatting, lints, documentation: all that needs no running service
	$(CARGO) fmt --all --check
	$(CARGO) fmt --manifest-path fuzz/Cargo.toml --check
	$(CARGO) clippy $(PROFILE) --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc $(PROFILE) --workspace --no-deps --document-private-items
	$(PYTHON) tests/tools/check_documents.py

test: test-rust test-service test-replicas test-v1 test-deploy ## all tests: Rust's, the release binary from outside, several replicas, others' suites of OpenAI's protocol, the deployment files

# Most of these tests wait more than they compute: on two cores, six tests at a time take three
# quarters of the time that four at a time take.
test-rust: export RUST_TEST_THREADS := $(shell echo $$((3 * $$(nproc))))
test-rust: test-servers ## unit and integration tests, those over HTTP on SQLite and again on PostgreSQL
	$(CARGO) test $(PROFILE) --workspace --lib
	$(CARGO) test $(PROFILE) --test it
	TEST_STORE=postgres $(CARGO) test $(PROFILE) --test it -- auth:: guessing:: sessions:: tokens:: purge:: prompts:: search:: realtime:: throttle:: shutdown:: v1::

test-service: build python-env ## the release binary from outside: contract, SimpleJWT, schema, pages in a browser, metrics, bad input, kill -9, upstream, shutdown
	$(PYTEST) --ignore-glob='*/test_replicas_*' tests/python

test-replicas: build python-env ## several replicas on a Postgres and a Redis that the tests start: contract, throttle, events, upstream, failures
	$(PYTEST) tests/python/test_replicas_*.py
	SERVICE_KIND=replica $(PYTEST) $(SAME_ON_REPLICAS)
	POSTGRES_KIND=postgres18 $(PYTEST) tests/python/test_replicas_upstream.py

test-prices: build python-env ## the prices of the release binary beside those of genai-prices: 10,000 random usages; a part of test-service
	$(PYTEST) tests/python/test_prices.py

test-litellm: build python-env python-env-litellm ## the release binary with LiteLLM's proxy as its upstream
	LITELLM=$(VENV_LITELLM) $(PYTEST) tests/python/test_litellm.py

test-v1: $(V1_BUILT) python-env-clients ## llm-comply, the tests inside OpenAI's Python library, and langchain-tests; `make test-clients` has the matrix of clients
	$(VENV_CLIENTS) $(CLIENTS_PYTEST) tests/clients/test_scripted_answers.py tests/clients/test_llm_comply.py tests/clients/test_openai_suite.py tests/clients/test_langchain_standard.py

test-llm-comply: $(V1_BUILT) python-env-clients ## llm-comply's tests of chat completions against the release binary, or another address: V1_BASE_URL, V1_KEY
	$(VENV_CLIENTS) $(CLIENTS_PYTEST) tests/clients/test_llm_comply.py

test-openai-python: $(V1_BUILT) python-env-clients ## the tests inside OpenAI's Python library: chat completions, embeddings, models
	$(VENV_CLIENTS) $(CLIENTS_PYTEST) tests/clients/test_openai_suite.py

test-langchain: $(V1_BUILT) python-env-clients ## langchain-tests: the standard tests of chat models and embeddings with langchain-openai
	$(VENV_CLIENTS) $(CLIENTS_PYTEST) tests/clients/test_langchain_standard.py

test-clients: $(V1_BUILT) python-env-clients python-env-llamaindex ## streams, tools, errors, limits and hang-ups with each client: OpenAI's for Python and Node, AI SDK, LangChain, LlamaIndex, llm
	$(VENV_CLIENTS) $(CLIENTS_PYTEST) tests/clients/test_matrix.py
	CLIENTS=llama-index,openai-python $(VENV_LLAMAINDEX) $(CLIENTS_PYTEST) tests/clients/test_matrix.py

test-deploy: python-env-deploy ## image, compose files, workflows and AWS templates: linters, schemas, and stacks created on a stand-in of AWS
	$(VENV_DEPLOY) -m pytest -c tests/deploy/pytest.ini --rootdir tests/deploy tests/deploy

soak: build python-env ## kill -9 under load and during calls KILL_ROUNDS (50) times each, failing servers FAULT_ROUNDS (10) times, a throttle race of 2 minutes, attacks in full, V1_CALLS (10000) mixed calls of /v1, BUDGET_KILLS (100) kills under budgets
	KILL_ROUNDS=$(KILL_ROUNDS) $(PYTEST) -s tests/python/test_kill.py tests/python/test_upstream_crash.py
	THROTTLE_RACE=120 $(PYTEST) -s tests/python/test_replicas_throttle.py
	FAULT_ROUNDS=$(FAULT_ROUNDS) $(PYTEST) -s tests/python/test_replicas_failures.py
	ATTACK_SCALE=1 $(PYTEST) -s tests/python/test_attacks.py
	V1_CALLS=$(V1_CALLS) V1_CANCELLED=$(V1_CANCELLED) $(PYTEST) -s tests/python/test_v1_parity.py tests/python/test_replicas_v1.py
	BUDGET_KILLS=$(BUDGET_KILLS) $(PYTEST) -s tests/python/test_budget_kill.py tests/python/test_replicas_budgets.py

fuzz: ## fuzz each target for FUZZ_SECONDS (60), or those that FUZZ names; needs a nightly toolchain
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(PYTHON) fuzz/run.py $(FUZZ)

bench: bench-engine bench-search bench-store bench-budgets bench-streams bench-service bench-posts bench-replicas ## every measurement: engine, search, store, streams, service, replicas, beside what each is compared with

bench-engine: ## the model alone, beside ONNX Runtime's int8 (fetches it)
	benches/engine.sh

bench-search: ## similarity, beside FAISS's exact index (fetches it; BENCH=--short: up to 10,000 rows)
	benches/search.sh $(BENCH)

bench-store: ## inserts, reads and sweeps of the SQLite store
	$(CARGO) bench --locked --bench store

bench-budgets: ## what checking a budget costs, with 10,000,000 rows of usage (BENCH=--short: 100,000)
	$(CARGO) bench --locked --bench budgets -- $(BENCH)

bench-streams: ## 512 paced streams at once and single calls, through the service and directly (BENCH=--short: seconds)
	$(CARGO) bench --locked --bench streams -- $(BENCH)

bench-gateway: build python-env-litellm ## time added to chat completions, and 512 paced streams, through /v1, through LiteLLM's proxy and directly (BENCH=--short: seconds)
	$(PYTHON) benches/gateway.py --litellm $(VENV_LITELLM) $(BENCH)

bench-service: build python-env ## the release binary under load, beside the system it replaces (BENCH=--short: only checks that it works)
	$(VENV) benches/service.py $(BENCH)

test-servers:
	@$(PYTHON) tests/tools/test_servers.py postgres postgres18 redis >/dev/null

bench-posts: build python-env ## posts a second with the mock and an upstream that answers at once (BEFORE=binary: beside another build; BENCH=--short)
	$(VENV) benches/posts.py $(if $(BEFORE),--before $(BEFORE)) $(BENCH)

bench-replicas: build python-env ## one and two replicas on a Postgres, and searches among 1,000,000 rows in it (BENCH=--short: only checks that it works)
	$(VENV) benches/replicas.py $(BENCH)

bench-import: build python-env ## import of 100,000 prompts of the Django system, killed half way (BENCH=--short: only checks that it works)
	$(VENV) benches/import.py $(BENCH)

bench-move: build python-env ## move of 100,000 prompts to PostgreSQL, killed half way, and searches on both sides (BENCH=--short: only checks that it works)
	$(VENV) benches/move.py $(BENCH)

python-env:
	@$(PYTHON) tests/tools/python_env.py >/dev/null

python-env-deploy:
	@$(PYTHON) tests/tools/python_env.py deploy >/dev/null

python-env-litellm:
	@$(PYTHON) tests/tools/python_env.py litellm >/dev/null

python-env-clients:
	@$(PYTHON) tests/tools/python_env.py clients >/dev/null

python-env-llamaindex:
	@$(PYTHON) tests/tools/python_env.py llamaindex >/dev/null
