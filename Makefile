# Two commands for a newcomer, `make demo` and `make test`: each makes .venv, installs what it needs
# there, and runs. docs/guide/install.md shows the same as plain commands.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests run side by side, each with threads of its own: on busy cores those must wait without spinning.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist worksteal

.PHONY: help demo test bench bench-cpu check docs clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train LeNet-5 on real digits and check the kernels with it"
	@echo "make test    run all tests"
	@echo "make bench   cnnops beside torch on this machine: a few layers, and the host's share of a call"
	@echo "make bench-cpu  the CPU engine beside torch on all layers and networks: 25 minutes, into results/"
	@echo "make check   what to run before a commit: ruff, mypy, the quick tests"
	@echo "make docs    the documentation, into build/docs/index.html; warnings are errors"
	@echo "make clean   remove what builds and tools left, but not $(VENV) nor compiled kernels"

demo: $(VENV)/.with-demo
	$(BIN)/cnnops demo

test: $(VENV)/.with-test
	@command -v $${CXX:-g++} >/dev/null || \
	  echo "g++ is missing: tests that emulate CUDA kernels will be skipped (sudo apt install g++)"
	$(PYTEST)

# One process: what is timed may not share the cores.
bench: $(VENV)/.with-bench
	$(BIN)/python -m pytest bench -q -p no:xdist --benchmark-only --benchmark-quiet \
	  --benchmark-max-time=0.5 --benchmark-min-rounds=7 --benchmark-warmup=on --benchmark-disable-gc

bench-cpu: $(VENV)/.with-bench
	$(BIN)/python bench/lab.py --cpu --out results

check: $(VENV)/.with-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -q -m "not slow"

docs: $(VENV)/.with-docs
	$(BIN)/python docs/drawings --check
	$(BIN)/python docs/budgets.py --check
	$(BIN)/sphinx-build -q -E -W --keep-going docs build/docs
	$(BIN)/python docs/check.py build/docs

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis

# .venv/.with-demo: the virtual environment with this checkout and its extra "demo". The stamp is as
# new as setup.py, so that a second call installs nothing. A GPU gets the extra of torch's own CUDA.
$(VENV)/.with-%: setup.py
	@command -v $(PYTHON) >/dev/null || \
	  { echo "$(PYTHON) is missing: sudo apt install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "cnnops needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V)." \
	    "If you have a newer one: make $* PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: sudo apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e '.[$*]'
	@if nvidia-smi >/dev/null 2>&1; then \
	  cuda=$$($(BIN)/python -c 'import torch; print((torch.version.cuda or "").partition(".")[0])'); \
	  if [ -n "$$cuda" ]; then \
	    echo "an NVIDIA GPU is here and torch is built for CUDA $$cuda: adding the extra cuda$$cuda"; \
	    $(BIN)/pip install -e ".[$*,cuda$$cuda]"; \
	  else \
	    echo "an NVIDIA GPU is here, but the torch in $(VENV) is built without CUDA: left as it is"; \
	  fi; \
	fi
	@touch $@
