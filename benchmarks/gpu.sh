#!/usr/bin/env bash
# Smoke test, tuning, every kernel's benchmark and the tests on the GPU at hand, in pieces below 8 minutes each:
# bash benchmarks/gpu.sh --out FOLDER, again and again until nothing is left (benchmarks/gpu.py).
# SAERL_BENCH_GRID=tiny rehearses it, also without a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=".:kernels/torch-ext${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
