# make demo | ablations | ablations-quick | test | test-slow | lint | clean; all but the last make .venv when it is
# missing or out of date.
#   PYTHON=python3.12 make test
#   make demo SEED=1 DIR=runs/demo_1

PYTHON ?= python3
SEED = 0
DIR = runs/demo

VENV = .venv/installed
BIN = .venv/bin

.PHONY: demo ablations ablations-quick test test-slow lint clean

demo: $(VENV)
	$(BIN)/python -m experiments.demo --seed $(SEED) --dir $(DIR)

ablations: $(VENV)
	$(BIN)/python -m experiments.ablations

ablations-quick: $(VENV)
	$(BIN)/python -m experiments.ablations --quick

test: lint
	$(BIN)/python -m pytest -q

test-slow: $(VENV)
	$(BIN)/python -m pytest -q -m slow

lint: $(VENV)
	$(BIN)/ruff check .

# Runs, the tiny world and caches of frames stay.
clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV): requirements.txt requirements/dev.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null || { \
	    echo "error: Python 3.11 or 3.12 is needed, $(PYTHON) is" \
	        "$$($(PYTHON) --version 2>/dev/null || echo missing); name one, as in PYTHON=python3.12 make test" >&2; exit 1; }
	@echo "installing requirements/dev.txt into .venv: minutes the first time"
	@$(PYTHON) -m venv .venv
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet -r requirements/dev.txt -c constraints.txt
	@touch $@
