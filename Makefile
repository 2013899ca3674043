# The README's two commands. Each needs only Python 3.11 or later, make and a package registry.
PYTHON ?= python3
# Elsewhere for all environments: make VENV=/somewhere test
VENV ?= .venv
ifeq ($(OS),Windows_NT)
BIN = Scripts
else
BIN = bin
endif

.PHONY: demo test test-gpu lint clean

demo: ## Install into a fresh environment and double the sample clip.
	rm -rf $(VENV)-demo demo
	$(PYTHON) -m venv $(VENV)-demo
	$(VENV)-demo/$(BIN)/python -m pip install --quiet --disable-pip-version-check ".[cpu]"
	mkdir demo
	$(VENV)-demo/$(BIN)/vidpipe run samples/bigbuckbunny.mp4 demo/bigbuckbunny-2x.mp4
	$(VENV)-demo/$(BIN)/vidpipe probe demo/bigbuckbunny-2x.mp4

$(VENV)/ready: pyproject.toml
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[cpu,dev]"
	touch $(VENV)/ready

lint: $(VENV)/ready ## Style and types.
	$(VENV)/$(BIN)/python -m ruff check .
	$(VENV)/$(BIN)/python -m ruff format --check .
	$(VENV)/$(BIN)/python -m mypy

test: lint ## Style, types and every test, in an environment of its own.
	$(VENV)/$(BIN)/python -m pytest

# On a machine with an NVIDIA GPU; CUDA=12 for older drivers. PYTHON_GPU takes an environment as it is.
CUDA ?= 13
PYTHON_GPU ?= $(VENV)-gpu/$(BIN)/python

$(VENV)-gpu/$(BIN)/python: pyproject.toml
	rm -rf $(VENV)-gpu
	$(PYTHON) -m venv $(VENV)-gpu
	$(VENV)-gpu/$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[cuda$(CUDA),dev]"

test-gpu: $(PYTHON_GPU) ## The tests that need a GPU; they fail where there is none.
	VIDPIPE_REQUIRE_CUDA=1 $(PYTHON_GPU) -m pytest -m cuda

clean:
	rm -rf $(VENV) $(VENV)-demo $(VENV)-gpu demo dist build
