# Two commands for a newcomer: `make demo` and `make test`. Each sets itself up: a virtual environment in .venv, and what
# the tests and the demo download or build is kept in ~/.cache/sola-edge.

PYTHON ?= python3
# A bare `torch` can bring gigabytes of CUDA libraries; this release is asked for first so that a CPU build can serve.
TORCH ?= torch==2.13.0
# Processes that share the tests; each keeps to its part of the cores.
JOBS ?= logical
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check transformers5 clean

demo: $(READY)
	$(BIN)/sola-edge demo --out build/demo

test: $(READY)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The compressor must also run on transformers 5, which the ONNX clients in the default environment do not accept yet.
transformers5: build/transformers5/.ready
	build/transformers5/bin/python -m pytest -m "not slow" tests/test_checkpoint.py tests/test_compress.py tests/test_architectures.py

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

build/transformers5/.ready: pyproject.toml
	$(PYTHON) -m venv build/transformers5
	build/transformers5/bin/python -m pip install --quiet --upgrade pip
	build/transformers5/bin/python -m pip install --quiet "$(TORCH)"
	build/transformers5/bin/python -m pip install --quiet "transformers>=5,<6" pytest pytest-timeout hypothesis --editable .
	touch $@

clean:
	rm -rf build $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
