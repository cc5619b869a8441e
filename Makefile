# make demo   set up, then watch a Visformer learn handwritten digits
# make test   set up, then run the tests (test-quick: those that take 2 minutes in all)
# make lint   set up, then check the style
#
# VENV is the virtual environment to create and use, PYTHON what creates it.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-quick lint

demo: $(VENV)/.installed
	$(BIN)/python -m tools.demo

test: $(VENV)/.installed-tests
	$(PYTEST)

test-quick: $(VENV)/.installed-tests
	$(PYTEST) -m "not (slow or distributed or detection)"

lint: $(VENV)/.installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/.installed-tests: $(VENV)/.installed tests/requirements.txt object_detection/requirements.txt
	$(BIN)/python -m pip install --quiet --requirement tests/requirements.txt
	touch $@
