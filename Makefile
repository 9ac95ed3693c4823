# Two commands for a new machine with Python 3.10+ and g++:
#
#   make demo     environment, build, then a language model on these kernels and a table of timings
#   make test     environment, build, then the checks; prints a counted list of stages
#   make test-all the same, with every point of the large matrices of tests
#
# TORCH=auto|cpu|default|system chooses torch's source (see tools/bootstrap.py), VENV the environment,
# JOBS the number of processes.
BASE_PYTHON ?= python3
VENV ?= .venv
TORCH ?= auto
JOBS ?= 2
PYTHON := $(VENV)/bin/python

export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
export JOBS

.PHONY: help demo test test-all lint format native wheel pins clean venv-demo venv-test
help:
	@sed -n 's/^\([a-z-]*\):.*##/  make \1\t/p' $(MAKEFILE_LIST)

venv-demo:
	@$(BASE_PYTHON) tools/bootstrap.py --venv $(VENV) --group demo --torch $(TORCH)

venv-test:
	@$(BASE_PYTHON) tools/bootstrap.py --venv $(VENV) --group test --torch $(TORCH)

demo: venv-demo ## set up and run the main job
	@$(PYTHON) setup.py -q build_ext --inplace
	@$(PYTHON) -m attnforge demo $(ARGS)

test: venv-test ## set up and run the checks
	@$(PYTHON) tools/stages.py

test-all: venv-test ## test, and every point of the large matrices
	@$(PYTHON) tools/stages.py --all

lint: ## ruff, mypy, clang-format
	@$(PYTHON) tools/stages.py lint

format: ## rewrite the sources as lint wants them
	@$(PYTHON) -m ruff check --fix-only --quiet .
	@$(PYTHON) -m ruff format .
	@$(VENV)/bin/clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp')

native: ## incremental build of the native libraries into python/attnforge
	@$(PYTHON) setup.py -q build_ext --inplace

wheel: ## dist/*.whl (manylinux) and dist/*.tar.gz; ARGS=--release refuses an incomplete one
	@$(PYTHON) tools/wheel.py $(ARGS)

pins: ## write the installed versions into requirements/
	@$(PYTHON) tools/pin_requirements.py

clean: ## remove what a build makes; the environment stays
	@rm -rf build dist python/*.egg-info python/attnforge/lib python/attnforge/_host*.so \
	  python/attnforge/_build_info.json
