# `make demo` and `make test` need nothing but Python 3.11 or newer: the first one run sets up .venv.

PYTHON ?= python3
# What `make test` runs, the gate: in ten minutes on two cores. Two at a time, but for those that start a Ray.
TESTS ?= not (gpu or nightly or vllm)
# What `make nightly` adds to `make test-vllm`.
NIGHTLY ?= nightly and not (gpu or vllm)
# What `make test-vllm` runs: all of them. CI leaves out what is marked nightly.
VLLM_TESTS ?= vllm
# Folders whose tests draw examples: at night twenty times as many, and others each time.
FUZZED := tests/core tests/io tests/kernels tests/methods tests/numerics
BIN := .venv/bin
READY := .venv/.ready
PEERS := .venv-peer/.ready .venv-autoround/.ready
VLLM := .venv-vllm/.ready
REAL := .venv/.real

.DELETE_ON_ERROR:
.PHONY: demo real test nightly test-vllm fuzz lint bench peer clean

demo: $(READY)
	@$(BIN)/qe-dist demo

# SmolLM2-135M alone and as a vision-language model, and texts and pictures to calibrate and measure with, in real/.
real: $(REAL)
	@$(BIN)/python training/real/build.py real

test: lint $(REAL)
	@$(BIN)/python -m pytest -q -m "($(TESTS)) and not ray" --numprocesses 2 --dist loadfile
	@$(BIN)/python -m pytest -q -m "($(TESTS)) and ray"

# Chaos, long Ray tests, every form of what the gate has one form of; then examples, versions, and vLLM.
nightly: $(REAL) $(PEERS) $(VLLM)
	@$(BIN)/python -m pytest -q -m "($(NIGHTLY)) and not ray" --numprocesses 2 --dist loadfile
	@$(BIN)/python -m pytest -q -m "($(NIGHTLY)) and ray"
	@$(BIN)/python -m pytest -q --hypothesis-profile=nightly --numprocesses 2 $(FUZZED)
	@$(BIN)/python benchmarks/versions.py
	@$(MAKE) test-vllm

# Checkpoints served by real vLLM on the CPU, in an environment of its own.
test-vllm: $(VLLM)
	@.venv-vllm/bin/python -m pytest -q -m "$(VLLM_TESTS)" tests/vllm

# Broken inputs of every kind, and what comes of them: make fuzz COUNT=2000 SEED=1
fuzz: $(READY)
	@$(BIN)/python -W ignore -m tests.fuzz.figures --count $(or $(COUNT),2000) --seed $(or $(SEED),1)

lint: $(READY)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/lint-imports
	@$(BIN)/mypy --no-error-summary

bench: $(READY)
	@$(BIN)/python benchmarks/pipeline.py

# llm-compressor and AutoRound, which benchmarks/quality/{peers,real_peers}.py compare with. Each wants another
# transformers than we do, and llm-compressor an older AutoRound, so each lives in an environment of its own.
peer: $(PEERS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that the package index (and not the lock) chooses between its CPU
# and CUDA builds. Build isolation is off because the lock already holds setuptools and wheel.
$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "qe_dist needs Python 3.11 or newer, and '$(PYTHON)' is not:" \
	    "$$($(PYTHON) --version 2>&1). Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "setting up .venv (minutes the first time: torch is large)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --no-deps --no-build-isolation -e .
	@touch $@

$(REAL): training/real/requirements.lock $(READY)
	@for package in $$(grep -v '^#' $<); do \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $$package 2>.venv/pip.log || { \
	    echo "package $$package cannot be installed: $$(grep -m 1 ERROR .venv/pip.log); retry with: make real" >&2; \
	    exit 2; }; done
	@touch $@

.venv-%/.ready: benchmarks/quality/requirements-%.lock
	@echo "setting up .venv-$* (minutes the first time: torch is large)"
	@$(PYTHON) -m venv .venv-$*
	@.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# torchvision's wheel declares its operators for CUDA alone; sitecustomize.py makes it importable beside a CPU build.
$(VLLM): pyproject.toml tests/vllm/requirements.lock tests/vllm/sitecustomize.py
	@echo "setting up .venv-vllm (minutes the first time: torch and vLLM are large)"
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -r tests/vllm/requirements.lock
	@.venv-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check \
	  --no-deps --no-build-isolation -e .
	@cp tests/vllm/sitecustomize.py "$$(.venv-vllm/bin/python -c 'import site; print(site.getsitepackages()[0])')"
	@touch $@
