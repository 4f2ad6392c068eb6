# Everything runs in .venv, made here; only Python 3.11 or newer, a C++ compiler and make are needed.
#   make demo            install, convert the embedded model, stream it under a small budget
#   make test            the tests (no torch); make smoke: the quickest of them; make test-slow: the long ones
#   make test-metal      whole models on the engine's Metal path, kernels run on the CPU where there is no Mac
#   make check           ruff, formatting, mypy; make format mends what it can
#   make test-arm        the native kernels for 64-bit Arm, under qemu (Debian: g++-aarch64-linux-gnu, qemu-user)
#   make test-reference  makes the reference vectors afresh with torch (.venv-reference) and compares

# The first interpreter that is new enough; override with `make PYTHON=...`.
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

VENV := .venv
RUN := $(VENV)/bin/python
REFERENCE := .venv-reference
PIP := -m pip install --quiet --disable-pip-version-check
# A change to any of these builds and installs the package again; Python files are used in place.
SOURCES := pyproject.toml CMakeLists.txt $(wildcard flashsparse/native/src/*)

# The tests' matrices are tiny: a BLAS that spreads them over threads spends its time waiting for itself.
test smoke test-slow test-metal test-reference: export OPENBLAS_NUM_THREADS := 1

.PHONY: demo test smoke test-slow test-metal test-arm check format test-reference clean

demo: $(VENV)/.package
	$(VENV)/bin/flashsparse demo

test: $(VENV)/.development
	$(RUN) -m pytest -m "not slow and not reference"

smoke: $(VENV)/.development
	$(RUN) -m pytest -x -m "not slow and not reference" tests/unit

test-slow: $(VENV)/.development
	$(RUN) -m pytest -m "slow and not reference"

# Part of test-slow too.
test-metal: $(VENV)/.development
	$(RUN) -m pytest -m "not reference" tests/metal/test_engine.py

# The kernels' NEON variant, on any machine. What is missing is said, and skips the run.
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_RUN ?= qemu-aarch64
test-arm:
	@missing=; for tool in $(ARM_CXX) $(ARM_RUN); do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	if [ -n "$$missing" ]; then echo "test-arm skipped: no$$missing (Debian: apt-get install g++-aarch64-linux-gnu qemu-user)"; \
	else $(MAKE) --no-print-directory build/arm/check && $(ARM_RUN) build/arm/check; fi

ARM_OBJECTS := $(patsubst flashsparse/native/src/%.cpp,build/arm/%.o,$(wildcard flashsparse/native/src/*.cpp)) \
	build/arm/kernels_check.o
build/arm/%.o: flashsparse/native/src/%.cpp $(SOURCES)
	@mkdir -p $(@D)
	$(ARM_CXX) -std=gnu++17 -O1 -Wall -Wextra -ffp-contract=off -fno-math-errno -Wno-psabi -c $< -o $@
build/arm/kernels_check.o: tests/native/kernels_check.cpp $(SOURCES)
	@mkdir -p $(@D)
	$(ARM_CXX) -std=gnu++17 -O1 -Wall -Wextra -Iflashsparse/native/src -c $< -o $@
build/arm/check: $(ARM_OBJECTS)
	$(ARM_CXX) -static $^ -o $@ -pthread

check: $(VENV)/.development
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/.development
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

test-reference: $(VENV)/.development $(REFERENCE)/.installed
	$(RUN) -m pytest -m reference

clean:
	rm -rf $(VENV) $(REFERENCE) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian's python3 comes without ensurepip; say which package brings it.
define make-venv
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found: install one, or run make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: install python3-venv (apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(1)
endef

$(VENV)/bin/python:
	$(call make-venv,$(VENV))

$(VENV)/.package: $(VENV)/bin/python $(SOURCES)
	@echo "installing flashsparse into $(VENV) (a few minutes the first time)"
	$(RUN) $(PIP) --editable .
	@touch $@

$(VENV)/.development: $(VENV)/bin/python $(SOURCES)
	@echo "installing flashsparse and its development tools into $(VENV) (a few minutes the first time)"
	$(RUN) $(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.package

$(REFERENCE)/bin/python:
	$(call make-venv,$(REFERENCE))

$(REFERENCE)/.installed: $(REFERENCE)/bin/python tests/reference/requirements.txt
	@echo "installing torch and transformers into $(REFERENCE)"
	$(REFERENCE)/bin/python $(PIP) -r tests/reference/requirements.txt
	@touch $@
