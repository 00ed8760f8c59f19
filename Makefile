# Everything sets itself up: a fresh clone needs Python >= 3.10 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m

.PHONY: demo test lint bench dev clean

demo: $(VENV)/.train
	rm -rf runs/demo
	$(RUN) neural_layers distill cvm --preset tiny --out runs/demo

test: $(VENV)/.test
	$(RUN) pytest -n 2

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(RUN) tests.check_types

bench: $(VENV)/.train
	$(RUN) benchmarks

# Editors follow links, and not the hook of an ordinary editable install.
dev: $(BIN)/python
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]' --config-settings editable_mode=strict

clean:
	rm -rf $(VENV) build dist runs *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The constraints keep pip from resolving torch to a CUDA build of several gigabytes.
$(VENV)/.train $(VENV)/.test: $(VENV)/.%: $(BIN)/python pyproject.toml setup.py constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@
