# Everything sets itself up: a fresh clone needs Python >= 3.10 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m

# The C kernels are built by every install, and again when a source of theirs changes.
C_SOURCES := $(wildcard kernels/*.[ch] kernels/*/*.[ch])

.PHONY: demo test lint chaos native sanitize aot bench bench-docs errors dev clean

# The demo's student keeps about 90 % of BLEU: asked for as usual, how a processor rounds would decide the exit status.
demo: $(VENV)/.train
	rm -rf runs/demo
	$(RUN) neural_layers distill cvm --preset tiny --min-retention 0.85 --out runs/demo

test: $(VENV)/.test
	$(RUN) pytest -n 2

# 50 SIGKILLs at random moments of a short distillation; it must end as if nothing had been. Some ten minutes.
chaos: $(VENV)/.test
	$(RUN) tests.chaos

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(RUN) tests.check_types

native: $(VENV)/.test
	$(BIN)/python setup.py -q build_ext --inplace

# The kernel tests on a build that traps every stray access, overflow and undefined shift. The C++ library is loaded with
# the sanitizer's, which would not find the throw of torch's exceptions otherwise; --capture=sys lets reports through.
sanitize: $(VENV)/.test
	NEURAL_LAYERS_SANITIZE=1 $(BIN)/python setup.py -q build_ext --build-lib build/sanitize
	for variant in $$($(BIN)/python -c "from neural_layers.kernels.c_library import VARIANTS, runs; print(*filter(runs, VARIANTS))"); do \
		echo "$$variant" && \
		NEURAL_LAYERS_CPU=$$variant NEURAL_LAYERS_NATIVE=$$(find build/sanitize -name '_native*.so') \
		LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libstdc++.so.6)" \
		ASAN_OPTIONS=detect_leaks=0 $(RUN) pytest -m native --capture=sys tests/kernels || exit 1; \
	done

# Every Triton kernel, from its real host code, for GPUs that need not be there: registers, spills, shared memory.
aot: $(VENV)/.test
	$(RUN) tests.triton.aot

bench: $(VENV)/.train
	$(RUN) benchmarks

# docs/benchmarks.md and its plots from what `python -m benchmarks --record` has written to benchmarks/results.
bench-docs: $(VENV)/.train
	$(RUN) benchmarks.docs

# docs/errors.md: the largest error of every backend of every op.
errors: $(VENV)/.test
	$(RUN) tests.error_table

# Editors follow links, and not the hook of an ordinary editable install.
dev: $(BIN)/python
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]' --config-settings editable_mode=strict

clean:
	rm -rf $(VENV) build dist runs *.egg-info kernels/*.so

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The constraints keep pip from resolving torch to a CUDA build of several gigabytes.
$(VENV)/.train $(VENV)/.test: $(VENV)/.%: $(BIN)/python pyproject.toml setup.py constraints.txt $(C_SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@
