# `make demo` and `make test` each do all set-up on their first call; later calls find it done.
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.setup-done
FAULTS := kills full flips poison memory ranks fuzz

.PHONY: demo test faults setup clean

demo: $(SETUP)
	rm -rf runs/demo
	$(BIN)/limbeck run cdl-kdp --out runs/demo

test: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2

faults: $(SETUP)
	mkdir -p benchmarks/faults
	status=0; for part in $(FAULTS); do \
		OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.$$part --out benchmarks/faults || status=1; \
	done; \
	$(BIN)/python -m tests.faults.page benchmarks/faults docs/reliability.md; exit $$status

setup: $(SETUP)

$(SETUP): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
