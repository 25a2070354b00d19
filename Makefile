# On a fresh machine: `make demo` trains a small model, `make quick` and `make test` test the code.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo quick test lint bench clean
venv: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fovea needs Python >= 3.11, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $(STAMP)

demo: venv
	$(BIN)/fovea pretrain configs/debug/demo.yaml
	@cat docs/after_demo.txt

PYTEST := $(BIN)/python -m pytest --numprocesses 2

# The unit tests: no processes, no training, no cluster (the marks in pyproject.toml).
quick: export OMP_NUM_THREADS = 1
quick: venv
	$(PYTEST) -q --dist worksteal -m "not processes and not slow and not slurm" --durations 5

# Everything. A file's tests share what its fixtures make, so a file stays in one worker. The tests on a cluster wait for
# its clock most of the time, so they run beside the others.
test: export OMP_NUM_THREADS = 1
test: venv
	@$(BIN)/python -m pytest tests/slurm > .slurm-tests.log 2>&1 & slurm=$$!; \
	$(PYTEST) --dist loadfile --ignore tests/slurm --durations 20; others=$$?; \
	wait $$slurm; slurm=$$?; cat .slurm-tests.log; exit $$((others + slurm))

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# IMAGES: a folder or a tar of your own photos; sizes decide the result.
IMAGES ?= samples/grocery/train/grocery-train-000000.tar
bench: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.storage
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.loader --images $(IMAGES)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.step

clean:
	rm -rf $(VENV) runs build dist *.egg-info
