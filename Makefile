# Needs Python 3.11 or later, git and make. `make demo` and `make test` do all the set-up.
#
#   PY=python3.12          the interpreter to build the environment with (default: the first found)
#   VENV=.venv             where the environment goes
#   TORCH=torch==2.12.0    the torch to install (default: the one in constraints.txt, as a CPU
#                          build on a machine without a GPU)
#   TORCH_INDEX=URL        a further package index to look for it
#   WORKERS=2              processes that run the tests
#   ARGS="-k window"       passed on to pytest

.PHONY: help demo dev check lint types arch test wheel proto bench clean
.DEFAULT_GOAL := help

export PYTHONSAFEPATH = 1
# The tests start hundreds of processes: what one has compiled the next ones need not.
unexport PYTHONDONTWRITEBYTECODE

VENV ?= .venv
BARE ?= build/bare
WORKERS ?= 2
ARGS ?=
PYTHON = $(VENV)/bin/python
INSTALL = .ci/install
REQUIREMENTS = pyproject.toml constraints.txt $(INSTALL)

help:
	@sed -n '1,/^$$/p' $(MAKEFILE_LIST)
	@echo "targets: demo test check (lint types arch wheel test) dev bench proto clean"

demo: $(VENV)/.runtime
	$(PYTHON) examples/demo.py

# A file is for one worker: its tests share daemons and models. Files go out as they are collected,
# those of tests/acceptance first, for they are the longest and have few tests: sorted by number of
# tests, which is the default, they are the last ones, and a worker waits for the other.
DIST = --dist loadfile --no-loadscope-reorder

test: $(VENV)/.dev
	$(PYTHON) -m pytest -m "not gpu" -n $(WORKERS) $(DIST) $(ARGS)

dev: $(VENV)/.dev

# The wheel's sources are gathered in the root: lint, which walks all of it, goes first.
check: lint
	$(MAKE) -j2 wheel types arch
	$(MAKE) test

lint: $(VENV)/.dev
	$(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check .

types: $(VENV)/.dev
	$(VENV)/bin/mypy

arch: $(VENV)/.dev
	$(VENV)/bin/lint-imports

bench: $(VENV)/.dev
	PYTHONPATH=benchmarks $(PYTHON) benchmarks/cpu_engine.py
	PYTHONPATH=benchmarks $(PYTHON) benchmarks/quality.py

# An environment with the declared dependencies alone shows what the development environment
# hides: an undeclared dependency, a file that is not in the wheel. It is a real one, torch and
# all (about a minute and 2.5 GB); it is built anew only when the requirements change.
wheel: $(VENV)/.dev
	rm -rf build/wheel src/*.egg-info
	$(PYTHON) -m build -q -o build/wheel .
	test $(BARE)/.ready -nt pyproject.toml \
		|| { rm -rf $(BARE); $(INSTALL) $(BARE) build/wheel/*.whl && touch $(BARE)/.ready; }
	$(BARE)/bin/python -m pip install -q --no-deps --force-reinstall build/wheel/*.whl
	$(BARE)/bin/python -m pip check
	cd / && $(abspath $(BARE))/bin/sparsed --version
	cd / && $(abspath $(BARE))/bin/python $(CURDIR)/tests/wheel_smoke.py

# Newer generators write code that only the newest protobuf loads.
proto: build/proto/.ready
	build/proto/bin/python -m grpc_tools.protoc -I src --python_out=src --pyi_out=src \
		--grpc_python_out=src src/sparsed/controller/v1/admin.proto

build/proto/.ready:
	$(INSTALL) build/proto "grpcio-tools==1.80.*" && touch $@

# Stamps: a second call finds the environment as it is.
$(VENV)/.runtime: $(REQUIREMENTS)
	$(INSTALL) $(VENV) -e . && touch $@

$(VENV)/.dev: $(REQUIREMENTS)
	$(INSTALL) $(VENV) -e ".[dev]" && touch $(VENV)/.runtime $@

clean:
	rm -rf .venv build .demo
