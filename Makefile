# make demo | make page | make test | make coverage | make lint | make clean. Needs Python 3.11 or newer and nothing else.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO := checkpoints/sample
# One thread: where another program keeps a core busy, two threads wait for each other ten times as long as they work.
ONE := OMP_NUM_THREADS=1 $(BIN)/python
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: demo page test test-slow coverage lint format clean

demo: .venv/ready  ## train NeDR on from the weights that ship, score both beside DCP, dehaze a folder
	$(ONE) train.py --model nedr --checkpoints $(DEMO) --resume
	$(ONE) test.py --model nedr dcp --weights $(DEMO)/weights.safetensors checkpoints/nedr/weights.safetensors \
		--hazy sample:test/hazy --clear sample:test/clear --output $(DEMO)/results
	$(ONE) test.py --hazy sample:test/hazy --output $(DEMO)/dehazed --overwrite
	@echo
	@echo "figures:   $(DEMO)/results/results.json, results.md, per_image.csv; the run's log: $(DEMO)/log.txt"
	@echo "pictures:  $(DEMO)/results/pictures (scored), $(DEMO)/dehazed/pictures (the folder)"
	@echo "curves:    $(BIN)/tensorboard --logdir $(DEMO)"

page: .venv/ready-page  ## dehaze photographs in a browser, on this computer
	.venv/page/bin/python -m page

test: .venv/ready-dev
	$(TESTS) -m "not slow"

test-slow: .venv/ready-dev  ## the tests that take long, alone
	$(TESTS) -m slow

coverage: .venv/ready-dev  ## the lines that make test runs, at least 90 % of each package
	$(TESTS) -m "not slow" --cov --cov-report=term:skip-covered
	@for package in models data losses utils; do \
		printf "$$package "; $(BIN)/coverage report --include="$$package/*" --format=total || exit 1; done

lint: .venv/ready-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell
	$(BIN)/mypy

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

# An environment that sees .venv's packages, with gradio and what that wants over them.
.venv/ready-page: .venv/ready requirements-page.txt
	$(BIN)/python -m venv .venv/page
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > \
		"$$(.venv/page/bin/python -c 'import site; print(site.getsitepackages()[0])')/project.pth"
	.venv/page/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-page.txt
	@touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .coverage* data/sample_set
