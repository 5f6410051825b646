# Two commands: `make demo` shows what Shoestring does, `make test` proves it.
# VENV picks the environment (a torch >= 2.11 in it is kept), PYTHON the interpreter that creates it.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALL_INPUTS := pyproject.toml constraints.txt scripts/install.sh $(wildcard native/*)

export PYTHON
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint types unit format results clean help

help:  ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: $(VENV)/.installed  ## Decode three real prompts plainly, by lookahead and by merged drafts, side by side
	@$(BIN)/shoestring pull smollm2-135m
	@$(BIN)/shoestring compare --prompts examples/prompts.jsonl --max-new-tokens 128 \
		--decoding autoregressive --decoding lookahead --decoding auto

test: $(VENV)/.installed-dev lint types unit  ## Lint, types and tests

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

unit: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

format: $(VENV)/.installed-dev  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

results: $(VENV)/.installed  ## Rewrite the tables in README and docs from benchmarks/results
	$(BIN)/python -m benchmarks.tables

clean:  ## Remove build outputs (not the environment)
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache

$(VENV)/.installed: $(INSTALL_INPUTS)
	@scripts/install.sh $(VENV)
	@touch $@

$(VENV)/.installed-dev: $(INSTALL_INPUTS)
	@scripts/install.sh $(VENV) dev
	@touch $@ $(VENV)/.installed
