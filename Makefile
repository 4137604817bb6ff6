# The front door. Every target sets up its own virtual environment first and needs nothing but make and Python 3.11+.
#
#   make demo                       make test ARGS="-k wire"             make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

# Threads of a step that wait for each other must not spin: on two busy cores that makes a step 50 times slower.
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(or $(VERSION),without-python)
WITH_DOCS := $(VENV)/.docs-$(or $(VERSION),without-python)

.DEFAULT_GOAL := help
.PHONY: help install demo test fast promises model attack torture parity lint format bench docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED) ## set up the virtual environment, as every target does by itself

demo: $(INSTALLED) ## train on real digits with the optimizer in a server process (ARGS=--json)
	$(BIN)/farstep demo $(ARGS)

test: lint ## check style, types and floors, then run the tests, two at a time (ARGS="-k wire" chooses, ARGS="-n 0" for one process)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

fast: $(INSTALLED) ## run the tests of pure rooms only, which start no process and open no connection (half a minute)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --fast $(ARGS)

promises: $(INSTALLED) ## write docs/promises.md: what is promised to users, and the tests that show it
	$(BIN)/python -m tests.promises --write

model: $(INSTALLED) ## try other, and 10,000, examples of the models: consistency modes, journals, and whatever is done to an optimizer (EXAMPLES=100000)
	MODEL_EXAMPLES=$(or $(EXAMPLES),10000) $(BIN)/python -m pytest --timeout 0 tests/coordinator/test_network.py tests/session/test_replay.py tests/durability/test_journal_model.py tests/client/test_anything.py $(ARGS)

attack: $(INSTALLED) ## attack a server: damaged bodies, connections held in every state, kills and cuts (ARGS="bodies --seed 2", --write)
	$(BIN)/python -m tests.attack $(ARGS)

torture: $(INSTALLED) ## kill servers 1,000 times, and at each step of writing down: nothing lost (ARGS="kills --seed 2", --write)
	$(BIN)/python -m tests.robustness $(ARGS)

parity: $(INSTALLED) ## compare every option of every optimizer with torch.optim (ARGS="--write" puts it into docs/)
	$(BIN)/python -m tests.parity $(ARGS)

lint: $(INSTALLED) ## ruff, mypy --strict, and import-linter for the floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(INSTALLED) ## let ruff sort imports, repair what it can and lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## measure every target and print one table (ARGS=--quick, ARGS="--markdown docs/benchmarks.md")
	$(BIN)/python tests/benchmarks/bench_all.py $(ARGS)

docs: $(WITH_DOCS) ## build the documentation site into build/site; without a network, once it has been built
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env --conf-dir docs . build/site
	@echo "build/site/index.html"

clean: ## remove everything make made, the virtual environment included
	@if [ -f "$(VENV)/pyvenv.cfg" ]; then rm -rf "$(VENV)"; fi
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find client service tests -type d -name __pycache__ -prune -exec rm -rf {} +

# The stamp names the Python version, so asking for another Python makes a new environment in the same place.
$(INSTALLED): pyproject.toml deploy/constraints.txt
	@if [ -z "$(VERSION)" ]; then \
	  echo "farstep needs Python 3.11 or newer, and '$(PYTHON)' does not run. Name another one: make $(or $(MAKECMDGOALS),test) PYTHON=python3.12"; exit 1; \
	fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "farstep needs Python 3.11 or newer, and '$(PYTHON)' is $(VERSION). Name another one: make $(or $(MAKECMDGOALS),test) PYTHON=python3.12"; exit 1; \
	}
	@echo "Setting up $(VENV) with Python $(VERSION): torch and what belongs to it, some minutes on the first time."
	@rm -f $(VENV)/.installed-*
	@found=$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); \
	if [ "$$found" != "$(VERSION)" ]; then $(PYTHON) -m venv --clear $(VENV); fi
	$(BIN)/python -m pip install --quiet --constraint deploy/constraints.txt --editable '.[service,archive,demo,dev,integrations]'
	@touch $@

# The site's tool is for this target alone, so nothing else waits for it.
$(WITH_DOCS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint deploy/constraints.txt --editable '.[docs]'
	@touch $@
