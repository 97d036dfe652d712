PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
EVALUATIONS := eval/support.py eval/demo.py eval/recipes.py eval/vision_prune.py
SOURCES := pyproject.toml $(shell find modhifi cli recipes -type f -not -path '*/__pycache__/*')

.PHONY: demo test lint eval clean

demo: $(VENV)/installed
	$(OFFLINE) $(BIN)/modhifi demo --force

# One thread a worker: two workers that each take every core slow each other down.
test: $(VENV)/editable
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/editable
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

eval: $(VENV)/editable
	for script in $(EVALUATIONS); do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The two installations replace each other, so each removes the other's stamp.
$(VENV)/installed: $(SOURCES) | $(BIN)/python
	rm -f $(VENV)/editable
	$(BIN)/pip install .
	touch $@

$(VENV)/editable: pyproject.toml | $(BIN)/python
	rm -f $(VENV)/installed
	$(BIN)/pip install -e '.[test]'
	touch $@
