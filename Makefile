# `make demo` and `make test` need Python 3.11 or newer and make; the first call installs everything into .venv.

PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
# Two workers with one thread each beat one process with two threads: most tests are too small to share a GEMM.
WORKERS ?= 2
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format bench coverage torture clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED) ## create .venv and install inlay with its tools

# torch goes first and alone: a build that is already there satisfies the second call, whatever index it came from.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "inlay needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "installing into .venv (once, a few minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## train an adapter on the texts of your Python, and compare it with the untouched model
	@$(BIN)/inlay demo $(ARGS)

test: $(INSTALLED) ## run the tests; ARGS are passed on to pytest
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 15 $(ARGS)

lint: $(INSTALLED) ## ruff and mypy --strict
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict src

format: $(INSTALLED) ## let ruff fix and format what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(INSTALLED) ## measure side by side with PEFT and write benchmarks/<date>-<machine>.md
	@$(BIN)/python benchmarks/run.py $(ARGS)

coverage: $(INSTALLED) ## attach every method to every architecture and write docs/coverage.md
	@$(BIN)/python benchmarks/coverage.py $(ARGS)

torture: $(INSTALLED) ## the slow reliability tests: kills, fuzzing, long runs
	@$(BIN)/python -m pytest tests/torture --torture --timeout 3600 $(ARGS)

clean: ## remove .venv and all caches
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
