# `make help` lists the targets and says which environment each one touches.

# nbdkit embeds the system's interpreter: so everything here uses that one.
PYTHON ?= /usr/bin/python3
VENV := .venv
FUZZ := build/fuzz
RUFF := $(VENV)/bin/ruff
MYPY := $(VENV)/bin/mypy
SOURCES := plugin qcow2snap_core tests

.PHONY: help demo test check mutants fuzz lint format deps deps-test clean

help:
	@echo "make demo            serve a small image's snapshots and read them with NBD clients"
	@echo "make demo FILE=disk.qcow2 SNAPSHOT=nightly"
	@echo "                     the same with an image of your own, which is only read"
	@echo "make test            everything that must pass: lint and check"
	@echo "make check           the test suite alone; one test: make check TESTS=tests/test_disk.py"
	@echo "make mutants         20,000 damaged images against QEMU (half an hour; COUNT= for another number)"
	@echo "make fuzz            a minute of coverage-guided fuzzing, with atheris from PyPI in $(FUZZ)/"
	@echo "make lint            ruff and mypy, from a virtual environment in $(VENV)/"
	@echo "make format          let ruff format the sources"
	@echo "make deps            install the system packages that serving needs (apt or dnf)"
	@echo "make deps-test       the same for the tests"
	@echo "make clean           remove what these targets made, but no system package"

deps:
	@packaging/install-deps run

deps-test:
	@packaging/install-deps test

# Any character may stand in a file's or snapshot's name, so the shell is not to parse them.
export FILE SNAPSHOT
demo: deps
	@$(PYTHON) tests/demo.py -- "$$FILE" "$$SNAPSHOT"

test: lint check

TESTS ?= tests
check: deps-test
	$(PYTHON) -m pytest -q -n 2 $(TESTS)

COUNT ?= 20000
mutants: deps-test
	$(PYTHON) tests/support/mutants.py $(COUNT)

# atheris comes from PyPI as well, and only here.
$(FUZZ)/ready: packaging/requirements-fuzz.txt | deps-test
	$(PYTHON) -m venv --system-site-packages $(FUZZ)
	$(FUZZ)/bin/pip install -q --disable-pip-version-check -r $<
	touch $@

fuzz: $(FUZZ)/ready
	$(FUZZ)/bin/python tests/fuzz.py

# Linters are no part of the product: they come from PyPI, at fixed versions, into a folder here.
$(VENV)/ready: packaging/requirements-lint.txt | deps-test
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(VENV)/bin/pip install -q --disable-pip-version-check -r $<
	touch $@

lint: $(VENV)/ready
	$(RUFF) check $(SOURCES)
	$(RUFF) format --check $(SOURCES)
	$(MYPY)

format: $(VENV)/ready
	$(RUFF) check --fix $(SOURCES)
	$(RUFF) format $(SOURCES)

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find $(SOURCES) -name __pycache__ -prune -exec rm -rf {} +
