# Everything a user or a developer types; `make help` lists it. Each target sets up what it needs.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
NPM := $(VENV)/npm
BUF := $(NPM)/node_modules/.bin/buf
BUF_VERSION := 1.75.0
# Of the client in JavaScript, which the tests run.
GRPC_JS := $(NPM)/node_modules/@grpc/grpc-js/package.json
GRPC_JS_PACKAGES := @grpc/grpc-js@1.14.7 @grpc/proto-loader@0.8.1 @grpc/reflection@1.0.4
# Policies for manifests. In an environment of its own: its pinned dependencies are not vLLM's.
CHECKOV := $(VENV)/checkov
CHECKOV_VERSION := 3.3.30

# The first Python that fits, or set PYTHON=/path/to/python.
PYTHON ?= $(shell for python in python3.11 python3 python3.12; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$python && break; done)

# What `make setup` installs. On a machine with GPUs: `make setup EXTRAS=gpu,dev TORCH=torch`, once: .installed has what is
# not the default.
INSTALLED := $(VENV)/.installed
INSTALLED_WITH := $(shell cat $(INSTALLED) 2>/dev/null)
DEFAULT_EXTRAS := cpu,dev
DEFAULT_TORCH := torch==2.13.0+cpu
installed_or_default = $(or $(patsubst $(1)=%,%,$(filter $(1)=%,$(INSTALLED_WITH))),$(DEFAULT_$(1)))
EXTRAS ?= $(call installed_or_default,EXTRAS)
TORCH ?= $(call installed_or_default,TORCH)
if_other = $(if $(filter-out $(DEFAULT_$(1)),$($(1))),$(1)=$($(1)))
SETTINGS = $(strip $(call if_other,EXTRAS) $(call if_other,TORCH))
# pip goes first: it knows the mirrors of this machine, and an additional package index where this is its address.
OUTRIDER_TORCH_INDEX ?=
PIP_TORCH = $(BIN)/pip install $(if $(OUTRIDER_TORCH_INDEX),--extra-index-url $(OUTRIDER_TORCH_INDEX)) '$(TORCH)'
# The default index of Python has no CPU builds; uv knows the one of PyTorch that has.
UV_TORCH = $(if $(OUTRIDER_TORCH_INDEX),false,$(if $(filter %+cpu,$(TORCH)),\
	$(BIN)/uv pip install --python $(BIN)/python --torch-backend cpu '$(TORCH:+cpu=)',false))

# Arguments of the demo: `make demo SEED=2`, `make demo ARGS="--help"`.
SEED ?=
ARGS ?=
# Seconds of fuzzing for each target.
FUZZ_SECONDS ?= 60
# Arguments of pytest: `make test ARGS="tests/unit -k packing"`. Most tests wait for processes to start: WORKERS run files
# of tests side by side, in the order of the folders, in which the short ones come last.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest
PYTEST_WORKERS = --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1

# No commas in its message: make would split it there.
die = { printf '\n%s\n' $(1) >&2; exit 1; }

.PHONY: help setup as-installed demo test test-slow fuzz test-gpu check bench proto format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(INSTALLED)  ## build .venv with everything that the other targets need (once, under 5 minutes)

# Written last, so that an install that was cut off starts again. Changes of pyproject.toml install what is new.
$(INSTALLED): pyproject.toml | as-installed
	@[ -n "$(PYTHON)" ] || $(call die,"Python 3.11 or 3.12 is needed and not on PATH: install it or run 'make $(MAKECMDGOALS) PYTHON=/path/to/python3.11'.")
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		$(call die,"$(PYTHON) comes without its venv module: on Debian and Ubuntu 'apt-get install python3-venv'.")
	@case ",$(EXTRAS)," in *,cpu,*) $(PYTHON) -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null;; esac || \
		$(call die,"vLLM's CPU build needs the system library libnuma.so.1: on Debian and Ubuntu 'apt-get install libnuma1'.")
	@echo "[1/5] virtual environment $(VENV) with $$($(PYTHON) --version)"
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV)
	@echo "[2/5] $(TORCH)"
	@$(BIN)/pip install uv >$(VENV)/setup.log 2>&1 || $(call die,"pip found no uv: $(VENV)/setup.log says why.")
	@log() { tee -a $(VENV)/setup.log | $(PROGRESS); }; $(PIP_TORCH) 2>&1 | log || $(UV_TORCH) 2>&1 | log || \
		$(call die,"No $(TORCH) was found (details: $(VENV)/setup.log). Set OUTRIDER_TORCH_INDEX to the address of a package index that has it: PyTorch's own is in the command for pip and CPU on https://pytorch.org/get-started/locally/")
# uv takes a tenth of pip's time, and leaves the torch that is there alone.
	@echo "[3/5] vLLM, the learner's libraries and the tools ($(EXTRAS))"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[$(EXTRAS)]' 2>&1 | tee -a $(VENV)/setup.log || \
		$(call die,"The install failed: $(VENV)/setup.log says why.")
# vLLM's CPU wheel asks for these three, nothing here uses them, and the builds that pip finds are for CUDA: they fail to
# import, or make PyTorch believe that it has a Triton compiler.
	@case ",$(EXTRAS)," in *,cpu,*) $(BIN)/uv pip uninstall --quiet --python $(BIN)/python torchaudio torchcodec triton;; esac
	@echo "[4/5] buf and grpc-js"
	@if command -v npm >/dev/null; then $(MAKE) --no-print-directory $(BUF) $(GRPC_JS); \
		else echo "npm is not installed: 'make check' will need it, and the tests of clients in other languages."; fi
	@echo "[5/5] checkov"
	@case ",$(EXTRAS)," in *,dev,*) $(MAKE) --no-print-directory $(CHECKOV)/bin/checkov;; esac
	@command -v kubectl >/dev/null || echo "kubectl is not installed: the tests of deploy/ will need it, nothing else does."
	@echo "$(SETTINGS)" >$@
	@echo "ready: 'source $(BIN)/activate' puts outrider on the PATH"

# Others than before are refused: pip takes one build of torch for the other, and both of vLLM have the same files.
as-installed:
	@[ ! -e $(INSTALLED) ] || [ "$(INSTALLED_WITH)" = "$(SETTINGS)" ] || \
		$(call die,"$(VENV) was set up with $(or $(INSTALLED_WITH),the defaults) and one build does not replace another in place: say 'make clean' first.")

# What pip and uv say, without their noise and without what failed: the log has that.
PROGRESS := sed -un -e 's/^ *\(Downloading .*\)/  \1/p' -e 's/^\(Installing collected packages\).*/  \1 .../p' \
	-e '/^Successfully built/p'

$(BUF):
	@command -v npm >/dev/null || $(call die,"npm is needed for buf (it lints the proto files): install Node.js.")
	@npm install --silent --no-audit --no-fund --save-exact --prefix $(NPM) @bufbuild/buf@$(BUF_VERSION)
	@ln -sf $(abspath $@) $(BIN)/buf

$(GRPC_JS): | $(BUF)
	@npm install --silent --no-audit --no-fund --save-exact --prefix $(NPM) $(GRPC_JS_PACKAGES)

$(CHECKOV)/bin/checkov:
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(CHECKOV)
	@$(BIN)/uv pip install --quiet --python $(CHECKOV)/bin/python checkov==$(CHECKOV_VERSION) 2>&1 | tee -a $(VENV)/setup.log || \
		$(call die,"The install of checkov failed: $(VENV)/setup.log says why.")

demo: setup  ## a vision-language model learns to read handwriting: two actors and a learner on this machine
	@$(BIN)/python -m examples.digits $(if $(SEED),--seed $(SEED)) $(ARGS)

test: setup  ## unit, contract, integration and fault tests
	@$(PYTEST) $(PYTEST_WORKERS) $(ARGS)

test-slow: setup  ## the tests that take many minutes
	@$(PYTEST) $(PYTEST_WORKERS) -m slow $(ARGS)

fuzz: setup  ## look for bytes that break the parsers of the actor, FUZZ_SECONDS for each of them
	@for target in generate stage upload; do $(BIN)/python -m tests.fuzz $$target --seconds $(FUZZ_SECONDS); done

test-gpu: setup  ## the tests that need a CUDA device
	@$(PYTEST) -m gpu $(ARGS)

check: setup $(BUF)  ## format, lint, types, imports, generated code, protocol compatibility
	@failed=; step() { echo "== $$1"; shift; "$$@" || failed=1; }; \
	step "ruff format" $(BIN)/ruff format --check; \
	step "ruff" $(BIN)/ruff check; \
	step "import contracts" $(BIN)/lint-imports; \
	step "generated code is current" $(BIN)/python proto/generate.py --check; \
	step "buf lint" $(BUF) lint proto; \
	base=$$(git describe --tags --abbrev=0 2>/dev/null || git rev-parse -q --verify main 2>/dev/null || true); \
	if [ -n "$$base" ] && git cat-file -e "$$base:proto/buf.yaml" 2>/dev/null; \
	then step "buf breaking" $(BUF) breaking proto --against ".git#ref=$$base,subdir=proto"; \
	else echo "== buf breaking: no earlier version to compare with"; fi; \
	step "mypy" $(BIN)/mypy; \
	[ -z "$$failed" ] || { echo "check failed: see above" >&2; exit 1; }

bench: setup  ## every benchmark, in pairs against its peer, and a table
	@$(BIN)/python -m benchmarks $(ARGS)

proto: setup  ## regenerate common/pb from the proto files
	@$(BIN)/python proto/generate.py

format: setup  ## format the code and apply the safe fixes
	@$(BIN)/ruff format && $(BIN)/ruff check --fix

clean:  ## remove what make built (runs/ stays)
	rm -rf $(VENV) .venv-peers .venv-peers-grpc build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
