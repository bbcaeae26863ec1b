# Two commands do everything: `make demo` and `make test`; `make quick` is for while you work. Each makes its own virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Without an NVIDIA GPU the CPU build of torch is asked for first: the default one brings gigabytes of CUDA libraries.
TORCH ?= 2.13.0
LOWEST ?= .venv-lowest
# Pins for reproducible test runs, on the Python versions that these releases support.
CONSTRAINTS := -c constraints.txt
PYTEST = $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal
MKDOCS = NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

# Threads that wait by spinning take the core that another one needs, on a machine with few or busy cores.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo quick test test-all docs format lowest requirements image clean

demo: $(VENV)/.demo
	$(BIN)/repvgg-deploy demo

# What to run after each change: the tests that take a fraction of a second each, in less than a minute.
quick: $(VENV)/.test
	$(PYTEST) -m "not slow"

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MKDOCS) build -q --strict
	$(PYTEST) -m "not exhaustive"

# The tests that take longest as well, and the variants of others that repeat what one of them shows.
test-all: test
	$(PYTEST) -m exhaustive

# The documentation as a site, in build/site; warnings are errors.
docs: $(VENV)/.test
	$(MKDOCS) build --strict

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The demo with the lowest versions that pyproject.toml allows and that have a wheel for this Python. uv finds them, which
# pip cannot; pip installs them. Packages that these need in turn are the newest that fit.
lowest:
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/pip install -q uv
	$(LOWEST)/bin/uv pip compile -q --resolution lowest-direct --no-deps --only-binary :all: --no-header --no-annotate \
		--python $(LOWEST)/bin/python --extra cpu pyproject.toml -o $(LOWEST)/lowest.txt
	@cat $(LOWEST)/lowest.txt
	$(MAKE) demo VENV=$(LOWEST) CONSTRAINTS="-c $(LOWEST)/lowest.txt" \
		TORCH="$$(sed -n 's/^torch==//p' $(LOWEST)/lowest.txt)"

# The image, with docker, podman or buildah: make image TORCH_INDEX=<PyTorch's CPU wheel index>, make image IMAGE=gpu.
image:
	docker/build.sh $(or $(IMAGE),cpu)

# The images' packages with their hashes, in requirements/*.txt.
requirements: $(BIN)/python
	$(BIN)/pip install -q uv
	$(BIN)/python requirements/export.py $(TORCH)

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: $(BIN)/python
	@if command -v nvidia-smi >/dev/null 2>&1; then $(BIN)/pip install -q "torch==$(TORCH)"; \
	else $(BIN)/pip install -q "torch==$(TORCH)+cpu" 2>/dev/null || $(BIN)/pip install -q "torch==$(TORCH)"; fi
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml constraints.txt
	$(BIN)/pip install -q $(CONSTRAINTS) -e '.[cpu]'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/pip install -q $(CONSTRAINTS) -e '.[cpu,rtx,dev]'
	@# Another runtime to hold INT8 graphs to; its tests say so where there is no wheel of it.
	-$(BIN)/pip install -q $(CONSTRAINTS) openvino
	@# Triton's client and KServe's schema, which the serving example is held to; only the source of the latter is read.
	-$(BIN)/pip install -q $(CONSTRAINTS) 'tritonclient[grpc,http]>=2.50'
	-$(BIN)/pip install -q --no-deps kserve==0.21.0 kubernetes==37.0.2
	@# timm is the other side of the round-trip tests. torchvision, which it imports, exists for CUDA builds of torch
	@# only: so both come without their dependencies, and the tests that need them say so where they do not load.
	-$(BIN)/pip install -q --no-deps timm==1.0.31 torchvision==0.28.0 pyyaml
	@touch $@

clean:
	rm -rf $(VENV) $(LOWEST) out build dist .pytest_cache .mypy_cache .ruff_cache
