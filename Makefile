# The two commands: `make demo` and `make test`. Each sets up .venv from nothing, with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
DEMO_OUT ?= reports/demo-run

.PHONY: demo test test-latest lock setup setup-dev check docs format clean

demo: setup
	$(BIN)/qeval compare --model demo --methods rtn,awq,mixed --corpus pydoc,chat --chat-tokens 48 --max-windows 8 --out $(DEMO_OUT)
	@echo "The report: $(DEMO_OUT)/report.html"

test: setup-dev check

# The same checks with the newest releases that pyproject.toml's ranges allow, in an environment of its own.
test-latest:
	$(PYTHON) -m venv --clear .venv-latest
	.venv-latest/bin/python -m pip install --quiet --upgrade --constraint constraints.in --editable '.[dev,cpu,docs]'
	$(MAKE) check BIN=.venv-latest/bin

# Renew constraints.txt: the newest versions that pyproject.toml's ranges and constraints.in allow.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet 'pip-tools>=7.5,<8'
	.venv-lock/bin/pip-compile $(LOCK_FLAGS) --upgrade --output-file constraints.new pyproject.toml constraints.in
	sed 's/^\(torch==[0-9.]*\)+cpu/\1/' constraints.new > constraints.txt
	rm constraints.new

LOCK_FLAGS := --quiet --extra dev --extra cpu --extra docs --strip-extras --allow-unsafe --no-annotate \
	--no-emit-index-url --no-emit-find-links --no-emit-trusted-host

check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BUILD_DOCS)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

# The documentation, in docs/_build. A warning is an error: a link to a page or heading that is not there, for one.
docs: setup-dev
	$(BUILD_DOCS)
	@echo "The documentation: docs/_build/index.html"

BUILD_DOCS = $(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --nitpicky --jobs 2 docs docs/_build

format: setup-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: .venv/base.stamp
setup-dev: .venv/dev.stamp

# What builds qeval and its dependencies without wheels (rouge-score) is locked too: it is installed first, used as it is.
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/base.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) hatchling editables setuptools
	$(INSTALL) --no-build-isolation --editable .
	touch $@

.venv/dev.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) hatchling editables setuptools
	$(INSTALL) --no-build-isolation --editable '.[dev,cpu,docs]'
	touch $@

clean:
	rm -rf .venv .venv-latest .venv-lock build dist docs/_build
