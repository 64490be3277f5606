# make demo | make test | make lint | make clean. Needs Python 3.11 or newer and nothing else.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO := checkpoints/sample

.PHONY: demo test lint format clean

demo: .venv/ready  ## train NeDR on the embedded sample set, score it, dehaze a folder
	$(BIN)/python train.py --model nedr --checkpoints $(DEMO) --resume
	$(BIN)/python test.py --model nedr --checkpoints $(DEMO) --hazy sample:test/hazy --clear sample:test/clear
	$(BIN)/python test.py --model nedr --checkpoints $(DEMO) --hazy sample:test/hazy --output $(DEMO)/dehazed
	@echo
	@echo "figures:   $(DEMO)/results/results.json, results.md, per_image.csv; the run's log: $(DEMO)/log.txt"
	@echo "pictures:  $(DEMO)/results/pictures (scored), $(DEMO)/dehazed/pictures (the folder)"
	@echo "curves:    $(BIN)/tensorboard --logdir $(DEMO)"

test: .venv/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

lint: .venv/ready-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: .venv/ready-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.venv/ready: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; name one: make PYTHON=python3.11 ..." >&2; exit 2; }
	@echo "making the environment in .venv (the first time takes a few minutes)"
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	@touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis data/sample_set
