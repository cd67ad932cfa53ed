# make train   install what is missing, train on embedded data, register the model
# make test    install what is missing, run the checks and the default tests
# make fuzz    thousands of bad configurations, data files and checkpoints; TLA_FUZZ_SEED=1 draws others
# make audit   write build/sbom.json, and look the locked packages up in a database of vulnerabilities
ARGS ?= --preset digits
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test fuzz check audit lock

train: .venv/installed
	$(BIN)/python jobs/train_tla.py $(ARGS)

# Two processes; a file stays on one of them, so that its tests share clusters and models. Bytecode is kept even where
# the environment says otherwise: hundreds of processes would compile the package again.
test: .venv/installed check
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

fuzz: .venv/installed
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m fuzz tests/fuzz

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

audit:
	PYTHON=$(PYTHON) deploy/audit.sh

# The stamp is written last, so that an interrupted installation is taken up again.
.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

lock: .venv/installed
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --extra dev --generate-hashes \
		--no-emit-index-url --output-file requirements.lock pyproject.toml requirements.in
