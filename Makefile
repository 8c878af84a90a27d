# `make help` lists the targets and says which environment each one touches.

# nbdkit embeds the system's interpreter: so everything here uses that one.
PYTHON ?= /usr/bin/python3
VENV := .venv
FUZZ := build/fuzz
RUFF := $(VENV)/bin/ruff
MYPY := $(VENV)/bin/mypy
SOURCES := plugin qcow2snap_core examples tests benchmarks

.PHONY: help demo test test-live compare-live check bench lint format deps deps-all deps-test
.PHONY: mutants differential fuzz native install uninstall deb rpm clean

help:
	@echo "make demo            serve a small image's snapshots and read them with NBD clients"
	@echo "make demo FILE=disk.qcow2 SNAPSHOT=nightly"
	@echo "                     the same with an image of your own, which is only read"
	@echo "make test            everything that must pass: lint and check"
	@echo "make check           the test suite alone; one test: make check TESTS=tests/image/test_disk.py"
	@echo "make test-live       the tests beside a running QEMU, at full length (a quarter of an hour)"
	@echo "make compare-live    what qemu-nbd -l returns where those tests want EIO; it passes always"
	@echo "make bench           measure beside qemu-nbd and nbdkit's file plugin, into build/bench.json"
	@echo "                     and build/bench.svg; ROWS='plain luks/copy' chooses rows, ROUNDS=3 how often,"
	@echo "                     ENGINES=native,python measures the plugin with both, side by side"
	@echo "make mutants         20,000 damaged images against QEMU (half an hour; COUNT= for another number)"
	@echo "make differential    2,000 images made by random commands of QEMU's tools, and all that we say of"
	@echo "                     them held against QEMU (half an hour; SEEDS= FROM= for others)"
	@echo "make fuzz            fuzz each parser for a minute in all; atheris goes into build/fuzz/"
	@echo "make lint            ruff and mypy, from a virtual environment in $(VENV)/"
	@echo "make format          let ruff format the sources"
	@echo "make native          compile the native engine in place; make deps does it too"
	@echo "make deps            install the system packages that serving needs (apt or dnf)"
	@echo "make deps-all        the same, and everything optional"
	@echo "make deps-test       the same for the tests"
	@echo "make install         plugin, package, command, man pages and completion, for the system;"
	@echo "                     PREFIX=/usr/local (or /usr) and DESTDIR= say where"
	@echo "make uninstall       remove what it installed"
	@echo "make deb             a Debian package in build/; installs what builds it (debhelper)"
	@echo "make rpm             an RPM package in build/; installs what builds it (rpmbuild)"
	@echo "make clean           remove what these targets made, but no system package"

deps:
	@packaging/install-deps run
	@$(MAKE) -s native

deps-all:
	@packaging/install-deps all
	@$(MAKE) -s native

deps-test:
	@packaging/install-deps test
	@$(MAKE) -s native

ENGINE := qcow2snap_core/_native/engine.abi3.so
native: $(ENGINE)
$(ENGINE): $(wildcard qcow2snap_core/_native/*.[ch]) packaging/build-native
	@packaging/build-native

# Any character may stand in a file's or snapshot's name, so the shell is not to parse them.
export FILE SNAPSHOT
demo: deps
	@$(PYTHON) tests/demo.py -- "$$FILE" "$$SNAPSHOT"

test: lint check

TESTS ?= tests
# What a read gives must not depend on the engine: these run once more without the native one.
READING := tests/image/test_disk.py tests/image/test_guard.py tests/image/test_raw.py tests/image/test_clusters.py \
	tests/e2e/test_matrix.py tests/e2e/test_disks.py tests/e2e/test_read_errors.py \
	tests/e2e/test_encryption.py tests/e2e/test_catalogue.py tests/e2e/test_mutants.py \
	tests/e2e/test_subcluster_bits.py tests/e2e/test_vm_state.py tests/e2e/test_threads.py
check: deps-test
	$(PYTHON) -m pytest -q -n 2 $(TESTS)
ifeq ($(TESTS),tests)
	QCOW2SNAP_NATIVE=0 $(PYTHON) -m pytest -q -n 2 $(READING)
endif

ROUNDS ?= 5
ROWS ?=
ENGINES ?= plugin
bench:
	@packaging/install-deps bench
	$(PYTHON) benchmarks/bench.py --rounds $(ROUNDS) --engines $(ENGINES) --json build/bench.json $(ROWS)
	$(PYTHON) benchmarks/chart.py build/bench.json build/bench.svg

# One test at a time: each makes load enough for a machine.
test-live: deps-test
	QCOW2SNAP_LIVE=long $(PYTHON) -m pytest -q -rP --timeout=1800 tests/live

compare-live: deps-test
	@$(PYTHON) tests/live/compare_qemu_nbd.py

COUNT ?= 20000
mutants: deps-test
	$(PYTHON) tests/support/mutants.py $(COUNT)

# A line for each seed that differs, with the command that replays it.
SEEDS ?= 2000
FROM ?= 0
differential: deps-test
	$(PYTHON) tests/differential.py --seeds $(SEEDS) --from $(FROM)

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

PREFIX ?= /usr/local
# Exported only if they are set: packaging/install finds out what they are here.
export PREFIX DESTDIR PLUGINDIR PYTHONDIR ZSHDIR NBDKIT PYTHON
install:
	@packaging/install install

uninstall:
	@packaging/install uninstall

# A package is built from a copy, so that its tools leave nothing in the tree.
deb rpm:
	@packaging/install-deps $@
	@packaging/build $@

clean:
	rm -rf $(VENV) build qcow2snap_core/_native/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find $(SOURCES) -name __pycache__ -prune -exec rm -rf {} +
