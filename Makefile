# Every target sets itself up in .venv; nothing needs root.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := src tests benchmarks tools examples

.PHONY: install demo test lint hooks package oldest matrix fuzz mutation docs faults bench

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing torch and what else ewavit needs into .venv: about 7 GB, two to five minutes."
	$(BIN)/python -m pip install -c constraints.txt -e '.[all,dev,docs]'
	touch $@

demo: install
	@echo "The demo takes 3 to 6 minutes on two cores that do nothing else: 30 epochs, a line for each."
	$(BIN)/ewavit train --config recipes/demo.yaml

test: install
	$(BIN)/python -m pytest -q -n auto

lint: install
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

hooks: install
	$(BIN)/pre-commit run --all-files

# Builds dist/ and runs the suite in the unpacked sdist, against the wheel.
package: install
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python tools/check_package.py -q -n auto

# The lower bounds of pyproject.toml, and for what they need the newest versions of a fixed day. Not every bound has a
# wheel for a newer Python: make oldest PYTHON=python3.10
OLDEST := .venv-oldest/bin
oldest:
	test -x $(OLDEST)/python || $(PYTHON) -m venv .venv-oldest
	$(OLDEST)/python -m pip install -q -c constraints.txt uv
	$(OLDEST)/uv pip install -q --python $(OLDEST)/python --resolution lowest-direct --exclude-newer 2026-11-24 \
		-e '.[all,dev]'
	$(OLDEST)/python -m pytest -q -n auto

# What would run with the oldest and newest versions, and what did: records/matrix.json. make matrix RUN=--run makes
# the environments (5 GB each) and runs the suite in them.
matrix: install
	test -z "$(RUN)" || $(BIN)/python -m pip install -q -c constraints.txt uv
	$(BIN)/python tools/matrix.py $(RUN)

# Damaged and odd input for every reader: 100,000 cases take about 15 minutes of one core.
fuzz: install
	$(BIN)/python tests/faults/fuzz.py --cases 102000 --seed 1 --record records/faults-fuzz.json

# Mutants of the core, a seeded sample of each file: about 20 minutes of one core. mutmut stays out of .venv.
mutation: install
	$(BIN)/python -m pip install -q --target .venv-mutation mutmut==3.8.1
	PYTHONPATH=.venv-mutation $(BIN)/python tools/mutation.py --most 45 --record records/mutation.json

# A broken link, an anchor that is not there or a public name without a docstring is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The table of docs/reliability.md: about an hour on two cores. The suite runs all of it shorter.
faults: install
	$(BIN)/python tests/faults/kill.py --rounds 2 --comparisons 6 --record
	$(BIN)/python tests/faults/damage.py --cases 1000 --cuts 20 --record
	$(BIN)/python tests/faults/groups.py --rounds 4 --record
	$(BIN)/python tests/faults/disk.py --record
	$(BIN)/python tests/faults/signals.py --cases 30 --record
	$(BIN)/python tests/faults/not_finite.py --record
	$(BIN)/python tests/faults/load.py --steps 200000 --files 1000000 --record

bench: install
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/data_rate.py
	$(BIN)/python benchmarks/data_rate.py --share
	$(BIN)/python benchmarks/replicas.py
	$(BIN)/python benchmarks/theory.py
	$(BIN)/ewavit train --config recipes/demo.yaml --name demo
	$(BIN)/python benchmarks/records.py runs/demo
