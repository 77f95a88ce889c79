# One word per task, the same on a laptop and in CI. Each installs what it needs, once, into .venv.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

# Everything a run writes for Prefect stays in the checkout, and nothing reports home.
export PREFECT_HOME := $(CURDIR)/.prefect
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS := false
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
# OpenMP threads that wait by spinning cost half the speed where cores are shared.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test check bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' Makefile

demo: .venv/.installed ## the whole pipeline on the built-in shop, on a CPU, without network
	$(BIN)/mllmsrec demo

test: export HF_HUB_OFFLINE := 1
test: .venv/.installed-dev ## every test, with coverage of the core and the store
	$(BIN)/python -m pytest --cov=mllmsrec_core --cov=storage --cov-report=term-missing:skip-covered --cov-fail-under=90

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
	rm -rf .venv .prefect .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage *.egg-info

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
