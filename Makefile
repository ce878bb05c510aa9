# One command each: make demo, make test. Both set up .venv first; nothing is installed outside of it.
unexport PYTHONDONTWRITEBYTECODE  # hundreds of worker processes import the same modules: they are compiled once
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo demo-comfy test test-engine test-host test-beside-engine test-beside-commands test-beside-sampling test-beside-workers test-beside-host test-simulated test-slow screenshots docs lint format clean

demo: $(VENV)/installed
	$(BIN)/python -m asyncdiff_nodes demo

demo-comfy: $(VENV)/installed
	$(BIN)/python -m asyncdiff_nodes demo-comfy

# parts side by side, four at a time, since most tests wait for one process or another; then, alone, what looks at times
test: lint
	$(MAKE) --no-print-directory -j4 test-beside-engine test-beside-sampling test-beside-host test-beside-workers test-simulated test-beside-commands
	$(BIN)/python -m pytest -m "timing and not slow"
	$(BIN)/python tests/host/run.py -m "timing and not slow"

test-beside-engine: $(VENV)/installed
	$(BIN)/python -m pytest -m "not timing and not slow" tests/engine

test-beside-commands: $(VENV)/installed
	$(BIN)/python -m pytest -m "not timing and not slow" --ignore tests/engine

test-beside-sampling: $(VENV)/installed
	$(BIN)/python tests/host/run.py -m "not timing and not slow" tests/host/routing tests/host/patches

test-beside-workers: $(VENV)/installed
	$(BIN)/python tests/host/run.py -m "not timing and not slow" tests/host/workers tests/host/controlnet tests/host/page

test-beside-host: $(VENV)/installed
	$(BIN)/python tests/host/run.py -m "not timing and not slow" $(addprefix --ignore tests/host/,routing patches workers controlnet page)

# on simulated GPUs, of which PyTorch takes one kind for good: in a process of its own
test-simulated: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow" tests/simulated
	$(BIN)/python tests/host/run.py -m "not slow" tests/simulated/host

test-engine: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow"

test-host: $(VENV)/installed
	$(BIN)/python tests/host/run.py -m "not slow"

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow
	$(BIN)/python -m pytest -m slow tests/simulated
	$(BIN)/python tests/host/run.py -m slow
	$(BIN)/python tests/host/run.py -m slow tests/simulated/host

# all pictures of the documentation; ONLY="thumbnails" for some
screenshots: $(VENV)/installed
	$(BIN)/python tests/host/run.py --screenshots $(ONLY)

# the documentation as a site, in out/site; a link that leads nowhere is an error
docs: $(VENV)/docs
	$(BIN)/python -m mkdocs build --strict

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/oxlint --deny-warnings js tests/js

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and alone, then everything else under the constraint that keeps it
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[cli,test]"
	touch $@

# without PyTorch: the reference is read from the source
$(VENV)/docs: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) out
