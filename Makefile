# These do everything, set-up included: `make demo`, `make serve`, `make test` and `make test-heavy`.

PYTHON ?= python3
# A relative path, since pip takes a space in it for the end of the path.
export PIP_CONSTRAINT := constraints.txt
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := .venv-clients
# A worker for each core. A file's tests stay together, since they share its engines; tests/conftest.py orders the files.
# A worker that dies ends the run: pytest-xdist may wait for ever for what is left of its file.
PYTEST := python -m pytest -n auto --dist loadfile --no-loadscope-reorder --max-worker-restart=0
# Each is a process on the GPU. Tests that compile kernels lie together, so workers that have done theirs take others'.
GPU_WORKERS ?= 4

.PHONY: help demo serve test test-heavy check format lint types unit heavy gpu-test count wheel clean

help:
	@echo "make demo    run example.py on the checkpoint that ships"
	@echo "make serve   serve the checkpoint that ships at http://127.0.0.1:8000, as the OpenAI API does"
	@echo "make test    format check, lint, types, tests: what every change must keep green"
	@echo "make test-heavy  the tests that take long, and property tests with all their examples; CI runs both"
	@echo "make check, make heavy  the same without the set-up (an environment of your own)"
	@echo "make format  rewrite the code in the project's format"
	@echo "make gpu-test  the tests that need a CUDA device (an environment of your own)"
	@echo "make count   lines of code by folder, file, function and path, against the limits"

demo: $(VENV)/.demo
	$(BIN)/python example.py

serve: $(VENV)/.server
	$(BIN)/python -m nanovllm serve tiny

test: $(VENV)/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(MAKE) --no-print-directory check

test-heavy: $(VENV)/.dev $(VENV)/.chromium $(CLIENTS)/.ready
	PATH="$(CURDIR)/$(BIN):$$PATH" $(MAKE) --no-print-directory heavy

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
	$(PYTEST) -m "not heavy"

heavy:
	$(PYTEST) -m "heavy or hypothesis" --hypothesis-profile=long

gpu-test:
	python -m pytest -m gpu -n $(GPU_WORKERS) --dist worksteal --max-worker-restart=0

count:
	python tools/count_lines.py

wheel: $(VENV)/.dev
	$(BIN)/python -m build --wheel

# What is installed is a function of these files; the stamps make the second run start at once. The mode "compat" puts
# the checkout on Python's path: with the hook of setuptools a script beside a checkout named nanovllm imports that
# folder, as a package without content.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat -e
$(VENV)/.demo: pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) .
	touch $@

$(VENV)/.server: $(VENV)/.demo
	$(INSTALL) ".[server]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(INSTALL) ".[dev]"
	touch $@

# A Chromium of the system, or else playwright's own.
$(VENV)/.chromium: $(VENV)/.dev
	command -v chromium || command -v chromium-browser || command -v google-chrome \
		|| (apt-get update && apt-get install --yes --no-install-recommends chromium) \
		|| $(BIN)/python -m playwright install --with-deps chromium
	touch $@

# The environment of the clients that tests/clients runs. It finds the packages of $(VENV) after its own: one torch is
# enough, and the versions that a client pins do not reach the package's own tests.
SITE := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(CLIENTS)/.ready: tests/clients/requirements.txt $(VENV)/.dev
	test -x $(CLIENTS)/bin/python || $(BIN)/python -m venv $(CLIENTS)
	"$(CURDIR)/$(BIN)/python" $(SITE) > "$$($(CLIENTS)/bin/python $(SITE))/engine.pth"
	PIP_CONSTRAINT= $(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

clean:
	rm -rf $(VENV) $(CLIENTS) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
