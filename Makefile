# Variables for the command line: PYTHON (to make the environment with), TORCH (what pip installs
# where the environment has no torch yet), DEMO (folder of the run), DEMO_ARGS, TEST_ARGS, BENCH_ARGS,
# GPU_REPORT (the file that gpu-report writes).
PYTHON ?= python3
TORCH ?= torch==2.13.0
DEMO ?= runs/demo
DEMO_ARGS ?= --steps 400
TEST_ARGS ?=
BENCH_ARGS ?=
GPU_REPORT ?= .benchmarks/gpu-report.md

# Python compiles what it imports; pip would compile a gigabyte.
export PIP_NO_COMPILE := 1

BIN := .venv/bin
NATIVE := pyproject.toml setup.py $(wildcard build_backend/*.py) $(shell find csrc -type f)

.PHONY: help demo test lint format bench gpu-report budgets wheel clean
.DELETE_ON_ERROR:

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.reference ## Train the small SyncMask model on drawn products and write its report
	$(BIN)/python -m reference.pretrain --output $(DEMO) \
		$(if $(wildcard $(DEMO)/config.json),--resume) $(DEMO_ARGS)

test: lint ## Lint, check types, and run every test, docstring and README example
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(TEST_ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 $(filter-out %gpu_on_cpu_triton.py,$(wildcard tests/test_*_triton.py))

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev ## Format the code and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.dev ## Time the operators against their floor and PyTorch
	$(BIN)/python -m pytest benchmarks --benchmark-only $(BENCH_ARGS)

gpu-report: .venv/.dev ## Check and time everything on this machine's GPU, into one file to send
	$(BIN)/python -m benchmarks.gpu_report --output $(GPU_REPORT)

budgets: .venv/.dev ## Write anew what the GPU kernels may take: docs/budgets.md
	PYTHONPATH=build_backend $(BIN)/python -m tests.budgets

wheel: .venv/.torch ## Build a wheel for every Python of this platform into dist/
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean: ## Remove the environment, builds and caches; keep runs/
	rm -rf .venv build dist *.egg-info syncmask_kernels/lib
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Torch comes first, so that the build compiles against it and nothing resolves to another one.
.venv/.torch:
	$(PYTHON) -m venv .venv
	$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))' \
		|| $(BIN)/python -m pip install '$(TORCH)'
	touch $@

.venv/.reference: .venv/.torch $(NATIVE)
	$(BIN)/python -m pip install --editable '.[reference]'
	touch $@

.venv/.dev: .venv/.torch $(NATIVE)
	$(BIN)/python -m pip install --editable '.[reference,test,dev]'
	touch $@ .venv/.reference
