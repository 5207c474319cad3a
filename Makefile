# The two commands: `make demo` and `make test`. Each sets up .venv from nothing.
PYTHON ?= python3
BIN := .venv/bin
DEMO_OUT ?= reports/demo-run

.PHONY: demo test setup setup-dev check format clean

demo: setup
	$(BIN)/qeval compare --model demo --methods rtn,awq,mixed --max-windows 8 --out $(DEMO_OUT)
	@echo "The report: $(DEMO_OUT)/report.html"

test: setup-dev check

check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

format: setup-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: .venv/base.stamp
setup-dev: .venv/dev.stamp

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/base.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/dev.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,cpu]'
	touch $@

clean:
	rm -rf .venv build dist
