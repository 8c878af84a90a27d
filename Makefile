# `make help` lists the targets and says where each one writes.

# nbdkit embeds the system's interpreter: so everything here uses that one.
PYTHON ?= /usr/bin/python3
VENV := .venv
FUZZ := build/fuzz
DISSECT := build/dissect
RUFF := $(VENV)/bin/ruff
MYPY := $(VENV)/bin/mypy
SOURCES := plugin qcow2snap_core examples tests benchmarks

.PHONY: help demo test test-on test-long test-live compare-live check bench lint format deps deps-all deps-test
.PHONY: simulation soak coverage
.PHONY: mutants differential fuzz native install uninstall deb rpm reproducible site clean

help:
	@echo "make demo            serve a small image's snapshots and read them with NBD clients"
	@echo "make demo FILE=disk.qcow2 SNAPSHOT=nightly"
	@echo "                     the same with an image of your own, which is only read"
	@echo "make test            everything that must pass: lint and check"
	@echo "make check           the test suite alone; one test: make check TESTS=tests/image/test_disk.py"
	@echo "make test-long       tests with many random moments and states, which make test leaves out"
	@echo "make test-on SUITE=trixie"
	@echo "                     make test in another Debian, which debootstrap fetches into build/on/;"
	@echo "                     RUN=bench another target there"
	@echo "make test-live       the tests beside a running QEMU, at full length (a quarter of an hour)"
	@echo "make compare-live    print what qemu-nbd -l returns where those tests expect EIO; it always passes"
	@echo "make simulation      the guard against QEMU's writes in any order, 20,000 histories (two minutes;"
	@echo "                     SEEDS= FROM= for others)"
	@echo "make bench           measure beside qemu-nbd and nbdkit's file plugin, into build/bench.json"
	@echo "                     and build/bench.svg; ROWS='plain luks/copy' chooses rows, ROUNDS=3 how often,"
	@echo "                     ENGINES=native,python measures the plugin with both, side by side;"
	@echo "                     JSON= names another file.  Rows that were measured before stay in it"
	@echo "make mutants         20,000 damaged images against QEMU (half an hour; COUNT= for another number)"
	@echo "make differential    2,000 images made by random commands of QEMU's tools, and all our results"
	@echo "                     compared with QEMU's (half an hour; SEEDS= FROM= for others)"
	@echo "make fuzz            fuzz each parser for a minute in all; atheris goes into build/fuzz/;"
	@echo "                     SANITIZE=1 with the native engine under AddressSanitizer and UBSan,"
	@echo "                     TARGET='engine 300' one of them for five minutes"
	@echo "make soak            use and misuse a server for an hour (MINUTES=), and look for leaks"
	@echo "make coverage        run the tests (TESTS=) without the native engine, and report the branches"
	@echo "                     that they take; coverage is installed into build/coverage/"
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
	@echo "make reproducible    the Debian package built twice, in different surroundings, and compared"
	@echo "make site            all documents as a static site in build/site/; installs what builds it (Sphinx)"
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
READING := tests/image/test_disk.py tests/image/test_guard.py tests/image/test_fileobject.py tests/image/test_clusters.py \
	tests/e2e/test_matrix.py tests/e2e/test_disks.py tests/e2e/test_read_errors.py \
	tests/e2e/test_encryption.py tests/e2e/test_catalogue.py tests/e2e/test_mutants.py \
	tests/e2e/test_subcluster_bits.py tests/e2e/test_vm_state.py tests/e2e/test_threads.py
check: deps-test $(DISSECT)/ready
ifeq ($(TESTS),tests)
	$(PYTHON) -m pytest -q -n 2 -m "not long" tests
	QCOW2SNAP_NATIVE=0 $(PYTHON) -m pytest -q -n 2 -m "not long" $(READING) -k "not libgcrypt"
else
	$(PYTHON) -m pytest -q -n 2 $(TESTS)
endif

test-long: deps-test $(DISSECT)/ready
	$(PYTHON) -m pytest -q -n 2 -m long tests

# Variables of this command line reach the make in there.
SUITE ?= trixie
test-on: RUN = test
test-on:
	@packaging/test-on $(SUITE) $(RUN)

# What reads XFS, Btrfs and LVM is on PyPI alone; without it those tests are left out.
$(DISSECT)/ready: packaging/requirements-files.txt | $(VENV)/ready
	$(VENV)/bin/pip install -q --disable-pip-version-check --target $(DISSECT) -r $<
	touch $@

ROUNDS ?= 5
ROWS ?=
ENGINES ?= plugin
JSON ?= build/bench.json
bench:
	@packaging/install-deps bench
	$(PYTHON) benchmarks/bench.py --rounds $(ROUNDS) --engines $(ENGINES) --json $(JSON) $(ROWS)
	$(PYTHON) benchmarks/chart.py $(JSON) $(JSON:.json=.svg)

# One test at a time: each makes load enough for a machine.
test-live: deps-test
	QCOW2SNAP_LIVE=long $(PYTHON) -m pytest -q -rP --timeout=1800 tests/live

compare-live: deps-test
	@$(PYTHON) tests/live/compare_qemu_nbd.py

simulation: SEEDS = 20000
simulation: deps-test
	$(PYTHON) tests/simulation --seeds $(SEEDS) --from $(FROM)

COUNT ?= 20000
mutants: deps-test
	$(PYTHON) tests/support/mutants.py $(COUNT)

# A line for each seed that differs, with the command that replays it.
SEEDS ?= 2000
FROM ?= 0
differential: deps-test
	$(PYTHON) tests/differential.py --seeds $(SEEDS) --from $(FROM)

soak: MINUTES = 60
soak: deps-test
	$(PYTHON) tests/soak.py --minutes $(MINUTES)

# What every interpreter that is started meanwhile measures too: the command's, and nbdkit's embedded
# one, which sees no virtual environment but what PYTHONPATH says.
COVERAGE := build/coverage
$(COVERAGE)/ready: packaging/requirements-coverage.txt | deps-test
	$(PYTHON) -m venv --system-site-packages $(COVERAGE)
	$(COVERAGE)/bin/pip install -q --disable-pip-version-check -r $<
	mkdir -p $(COVERAGE)/start
	echo 'import coverage; coverage.process_startup()' > $(COVERAGE)/start/sitecustomize.py
	touch $@

coverage: $(COVERAGE)/ready
	rm -f $(COVERAGE)/data*
	COVERAGE_PROCESS_START=$(CURDIR)/packaging/coverage.ini QCOW2SNAP_NATIVE=0 \
	PYTHONPATH=$(CURDIR)/$(COVERAGE)/start:$$(echo $(CURDIR)/$(COVERAGE)/lib/python3*/site-packages) \
	    $(PYTHON) -m pytest -q -p no:cacheprovider $(TESTS)
	$(COVERAGE)/bin/coverage combine -q --rcfile=packaging/coverage.ini
	$(COVERAGE)/bin/coverage report --rcfile=packaging/coverage.ini

# atheris comes from PyPI as well, and only here.
$(FUZZ)/ready: packaging/requirements-fuzz.txt | deps-test
	$(PYTHON) -m venv --system-site-packages $(FUZZ)
	$(FUZZ)/bin/pip install -q --disable-pip-version-check -r $<
	touch $@

SANITIZE ?=
TARGET ?=
SANITIZED := $(FUZZ)/sanitized
fuzz: $(FUZZ)/ready $(ENGINE)
ifeq ($(SANITIZE),)
	$(FUZZ)/bin/python tests/fuzz.py $(TARGET)
else
	@rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	@cp -r qcow2snap_core packaging tests $(SANITIZED) && rm $(SANITIZED)/qcow2snap_core/_native/*.so
	@# Linked without the sanitizers' library, which would hide the fuzzer's own from it.
	cd $(SANITIZED)/qcow2snap_core/_native && cc -std=gnu11 -O1 -g -fPIC -c ./*.c \
	    -fsanitize=address,undefined -fno-sanitize-recover=all \
	    -I"$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')" && \
	    cc -shared ./*.o -o engine.abi3.so -ldl
	LD_PRELOAD="$$($(FUZZ)/bin/python -c 'import atheris; print(atheris.path())')/asan_with_fuzzer.so" \
	    PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 \
	    $(FUZZ)/bin/python $(SANITIZED)/tests/fuzz.py $(TARGET)
endif

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

reproducible:
	@packaging/install-deps deb
	@packaging/reproducible

site:
	@packaging/install-deps site
	@$(PYTHON) packaging/site/build.py

clean:
	rm -rf $(VENV) build qcow2snap_core/_native/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find $(SOURCES) -name __pycache__ -prune -exec rm -rf {} +
