# make run   set everything up, then the whole pipeline on the default target
# make test  set everything up, then lint, types and tests
# Needs Python 3.11-3.13 and make. PYTHON=... chooses the interpreter, ARGS=... is passed on.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
USABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(USABLE)' 2>/dev/null && echo $$p && break; done)

.PHONY: setup run test lint format clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11-3.13 with venv was found; install one or run" \
		"'make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)'." >&2; exit 3; }
	@$(BIN)/python -c '$(USABLE)' 2>/dev/null || { echo "Creating $(VENV) with $(PYTHON)"; \
		$(PYTHON) -m venv --clear $(VENV); }
	@echo "Installing into $(VENV) (a few minutes the first time)"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

run: setup
	$(BIN)/pipeline run $(ARGS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Two workers with one thread each: many tiny models run faster so than one worker with all threads.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadscope $(ARGS)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		.import_linter_cache
