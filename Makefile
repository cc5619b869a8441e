# make demo   set up, then watch a Visformer learn handwritten digits
# make test   set up, then run the tests (test-quick: those that take 2 minutes in all)
# make lint   set up, then check the style
# make constraints   set up, then write the installed versions to constraints.txt
#
# VENV is the virtual environment to create and use, PYTHON what creates it.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-quick lint constraints

demo: $(VENV)/.installed
	$(BIN)/python -m tools.demo

test: $(VENV)/.installed-tests
	$(PYTEST)

test-quick: $(VENV)/.installed-tests
	$(PYTEST) -m "not (slow or distributed or detection)"

lint: $(VENV)/.installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

constraints: $(VENV)/.installed-tests
	echo "# versions that the tests passed with, by make constraints; pip install -c constraints.txt" > constraints.txt
	$(BIN)/python -m pip list --format=freeze --exclude pip >> constraints.txt

$(VENV)/.installed: requirements.txt package/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --requirement requirements.txt
	touch $@

$(VENV)/.installed-tests: $(VENV)/.installed tests/requirements.txt object_detection/requirements.txt
	$(BIN)/python -m pip install --requirement tests/requirements.txt
	touch $@
