# `make demo` and `make test` do all the set-up they need, once, in .venv.
# Needed beforehand: Python >= 3.10 with its headers, and a C++ compiler (for Inductor).

PYTHON ?= python3
CXX := $(shell command -v $${CXX:-g++} || command -v clang++)
BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c .ci/constraints.txt

.PHONY: help setup demo test check test-slow test-oldest test-cuda test-ascend bench format clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

setup: $(READY)  ## make .venv (every other target does so too)

$(READY): pyproject.toml .ci/constraints.txt
	@echo "== set-up: .venv"
	@test -n "$(CXX)" || { echo "No C++ compiler found. Inductor needs g++ or clang++."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0  # first: nothing after it may pull in another one
	$(PIP) -e ".[dev,hf]"
	@touch $@

demo: $(READY)  ## quantize, compile and run a real model, dense against 4 bits
	@echo "== demo: examples/generate.py"
	$(BIN)/python examples/generate.py

test: export TORCH_DEVICE_BACKEND_AUTOLOAD = 0
test: check  ## lint, types and tests
	@echo "== test: pytest"
	$(BIN)/python -m pytest

check: $(READY)  ## lint and types only
	@echo "== check: ruff, mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-slow: export TORCH_DEVICE_BACKEND_AUTOLOAD = 0
test-slow: $(READY)  ## the long matrices
	@echo "== test: pytest -m slow"
	$(BIN)/python -m pytest -m slow

test-oldest: export TORCH_DEVICE_BACKEND_AUTOLOAD = 0
test-oldest:  ## the tests with the oldest PyTorch and transformers (own environment, 5 GB of downloads)
	$(PYTHON) -m venv .cache/oldest
	.cache/oldest/bin/python -m pip install --disable-pip-version-check -c .ci/oldest.txt -e ".[dev,hf]"
	.cache/oldest/bin/python -m pytest

test-cuda: $(READY)  ## the tests that need an NVIDIA GPU
	@echo "== test: pytest -m cuda"
	$(BIN)/python -m pytest -m cuda

test-ascend:  ## the Ascend tests on the real torch_npu, without an NPU (Linux; own environment)
	@echo "== test: tests/npu_stub/run.sh"
	PYTHON=$(PYTHON) tests/npu_stub/run.sh .cache/npu_stub

bench: $(READY)  ## the tables of examples/benchmarks/results
	@echo "== benchmarks: an hour, on an otherwise idle machine"
	$(PIP) -e ".[bench]"
	$(BIN)/python examples/benchmarks/decode.py --out examples/benchmarks/results/decode.md
	$(BIN)/python examples/benchmarks/decode.py --prompt 64 --out examples/benchmarks/results/decode-short.md
	$(BIN)/python examples/benchmarks/cpu_rows.py --out examples/benchmarks/results/cpu_rows.md
	$(BIN)/python examples/benchmarks/passes.py --out examples/benchmarks/results/passes.md
	$(BIN)/python examples/benchmarks/export.py --out examples/benchmarks/results/export.md
	$(BIN)/python examples/benchmarks/experts.py --out examples/benchmarks/results/experts.md
	$(BIN)/python examples/benchmarks/accuracy.py --grids "4 bits, g64, sym" --settings act_group_aware \
		"default: act_group_aware, scale_search, gptaq" --out examples/benchmarks/results/accuracy.md

format: $(READY)  ## sort imports, mend what ruff can, format
	@echo "== format: ruff"
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv, caches and downloads
	rm -rf .venv .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
