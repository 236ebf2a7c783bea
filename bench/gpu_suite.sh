#!/usr/bin/env bash
# All that a GPU is asked, in under nine minutes: build, checks, tests, sanitizers, measurements. `--list` names the
# parts, `--help` the options. Needs this checkout, nvcc and a Python with torch (PYTHON=...), and no network.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" "$root/bench/gpu/suite.py" "$@"
