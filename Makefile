# `make demo` and `make test` work on a fresh checkout: they set everything up first.
BIN := .venv/bin

.PHONY: setup demo check test test-all clean

setup:
	@tools/setup

demo: setup
	@$(BIN)/eckart demo

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/pytest

test-all: check
	$(BIN)/pytest -m "slow or not slow"

clean:
	rm -rf .venv dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
