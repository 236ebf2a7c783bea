# Both commands set up everything that they need in .venv; the second time only what has changed is built.
#   make demo    generate with the bundled model
#   make test    lint, then all tests (ARGS="-k name" for some)
PYTHON ?= python3
ENV_PYTHON := .venv/bin/python

.PHONY: demo test lint format build kernels gate clean

demo:
	@$(PYTHON) tools/setup_env.py
	@.venv/bin/river generate --demo

test:
	@$(PYTHON) tools/setup_env.py --dev
	@$(MAKE) --no-print-directory lint
	@$(ENV_PYTHON) -m pytest $(ARGS)

# Where the formatters cannot be had (a prepared machine without network), the tests still run; CI insists.
CXX_FILES = find csrc python_tests bench -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu'
lint:
	@if $(ENV_PYTHON) -m ruff --version >/dev/null 2>&1 && test -x .venv/bin/clang-format; then \
	  $(ENV_PYTHON) -m ruff check . && $(ENV_PYTHON) -m ruff format --check . && \
	  $(CXX_FILES) | xargs .venv/bin/clang-format --dry-run -Werror; \
	elif [ -n "$$CI" ]; then echo "lint: ruff or clang-format is missing"; exit 1; \
	else echo "lint: skipped, ruff or clang-format is not installed"; fi

format:
	@$(ENV_PYTHON) -m ruff check --fix . && $(ENV_PYTHON) -m ruff format .
	@$(CXX_FILES) | xargs .venv/bin/clang-format -i

# Only the extension, in place, for whatever PYTHON is.
build:
	@$(PYTHON) setup.py -q build_ext --inplace

# Only the CPU kernels, as a library that never saw torch. (The CUDA ones never see it either: make gate.)
kernels:
	@cmake -S . -B build/cmake -DCMAKE_BUILD_TYPE=Release >/dev/null && env -u MAKELEVEL -u MAKEFLAGS cmake --build build/cmake --parallel --target river_kernels

# Registers, spills and shared memory of every CUDA kernel on every architecture, against their budgets.
gate:
	@$(PYTHON) tools/compile_gate.py

clean:
	rm -rf build dist *.egg-info river_ext/_C*.so
