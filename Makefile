# make demo | make test | make lint | make clean. Needs Python 3.11 or newer and nothing else.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO := checkpoints/sample
# One thread: where another program keeps a core busy, two threads wait for each other ten times as long as they work.
ONE := OMP_NUM_THREADS=1 $(BIN)/python

.PHONY: demo test lint format clean

demo: .venv/ready  ## train NeDR on from the weights that ship, score both beside DCP, dehaze a folder
	$(ONE) train.py --model nedr --checkpoints $(DEMO) --resume
	$(ONE) test.py --model nedr dcp --weights $(DEMO)/weights.safetensors checkpoints/nedr/weights.safetensors \
		--hazy sample:test/hazy --clear sample:test/clear --output $(DEMO)/results
	$(ONE) test.py --hazy sample:test/hazy --output $(DEMO)/dehazed --overwrite
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
