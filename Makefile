# make run [ARGS="..."]   the experiment: python -m kd_jax.run ARGS
# make sweep [ARGS="..."], make reproduce ARGS=hinton2015: python -m kd_jax.sweep and kd_jax.reproduce
# make test [ARGS="..."]  ruff, mypy and the tests, but for the slow ones; with ARGS, the tests that they name, slow ones too
# make slow [ARGS="..."]  the slow tests: whole trainings, commands and processes, with many settings
# make bench [ARGS=...]   the benchmarks, with PyTorch and Keras: ARGS=--quick takes at most 3 minutes
# make docs              the pages, as build/docs/index.html, with their links checked; a warning is an error
# PYTHON=python3.12 picks another interpreter (3.11 or newer), with a virtual environment of its own.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
ifneq ($(origin PYTHON),file)
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
endif
ARGS ?=
# Numbers of float32 beside PyTorch's are those of the programs that users compile; all other tests compile quickly.
AS_USERS_COMPILE := tests/train/test_parity.py
PARITY := -m "not slow"
MARKED = $(if $(ARGS),,-m "not slow" --deselect $(AS_USERS_COMPILE))
.DELETE_ON_ERROR:
.PHONY: run sweep reproduce test slow suite parity bench docs clean

run: $(VENV)/.installed
	@$(VENV)/bin/python -m kd_jax.run $(ARGS)

sweep reproduce: $(VENV)/.installed
	@$(VENV)/bin/python -m kd_jax.$@ $(ARGS)

test: $(VENV)/.installed-for-tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	@$(MAKE) --no-print-directory -j 2 suite $(if $(ARGS),,parity)

suite: $(VENV)/.installed-for-tests
	JAX_PLATFORMS=cpu XLA_FLAGS="$$($(VENV)/bin/python -m tools.quick_flags)" \
	  $(VENV)/bin/python -m pytest -n 2 --dist loadfile $(MARKED) $(ARGS)

slow:
	@$(MAKE) --no-print-directory suite MARKED='-m slow $(if $(ARGS),,--deselect $(AS_USERS_COMPILE))'
	@$(if $(ARGS),,$(MAKE) --no-print-directory parity PARITY='-m slow')

parity: $(VENV)/.installed-for-tests
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m pytest $(PARITY) $(AS_USERS_COMPILE)

bench: $(VENV)/.installed-for-bench
	$(VENV)/bin/python -m benchmarks.throughput $(ARGS)

docs: $(VENV)/.installed-for-docs
	$(VENV)/bin/python -m sphinx -E -W --keep-going --quiet -c docs . build/docs $(ARGS)
	@echo "build/docs/index.html"

clean:
	rm -rf .venv .venv-*

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kd_jax needs Python 3.11 or newer; this is %d.%d: use make PYTHON=python3.12" % sys.version_info[:2] or 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-for-tests: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-for-bench: $(VENV)/.installed-for-tests
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[parity,peers]'
	@touch $@

$(VENV)/.installed-for-docs: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@ $(VENV)/.installed
