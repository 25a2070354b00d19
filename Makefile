# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo test lint bench clean
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

# The tests on a cluster wait for its clock most of the time, so they run beside the others.
test: export OMP_NUM_THREADS = 1
test: venv
	@$(BIN)/python -m pytest tests/slurm > .slurm-tests.log 2>&1 & slurm=$$!; \
	$(BIN)/python -m pytest --ignore tests/slurm; others=$$?; \
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
