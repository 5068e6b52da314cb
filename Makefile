# Two commands do everything, set-up included: `make demo` and `make test`.

PYTHON ?= python3
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test check format lint types unit gpu-test count wheel clean

help:
	@echo "make demo    run example.py on the checkpoint that ships"
	@echo "make test    format check, lint, types, tests: what CI runs"
	@echo "make check   the same without the set-up (an environment of your own)"
	@echo "make format  rewrite the code in the project's format"
	@echo "make gpu-test  the tests that need a CUDA device (an environment of your own)"
	@echo "make count   lines of code by folder, file, function and path, against the limits"

demo: $(VENV)/.demo
	$(BIN)/python example.py

test: $(VENV)/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(MAKE) --no-print-directory check

check: lint types unit count

format:
	ruff format .
	ruff check --fix .

lint:
	ruff format --check .
	ruff check .

types:
	mypy

unit:
	python -m pytest

gpu-test:
	python -m pytest -m gpu

count:
	python tools/count_lines.py

wheel: $(VENV)/.dev
	$(BIN)/python -m build --wheel

# What is installed is a function of these files; the stamps make the second run start at once.
$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
