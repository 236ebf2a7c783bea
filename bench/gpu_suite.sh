#!/usr/bin/env bash
# All that a GPU is asked, in under nine minutes: build, checks, tests, sanitizers, measurements. `--list` names the
# parts, `--help` the options. Needs this checkout, nvcc and a Python with torch (PYTHON=...), and no network.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_suite.py" "$@"
