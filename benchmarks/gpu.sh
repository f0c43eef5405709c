#!/usr/bin/env bash
# Correctness, tuning and every benchmark on the GPU at hand in under 9 minutes; results/<gpu>/*.json.
# `make bench-report` then writes the tables. SAERL_BENCH_GRID=tiny rehearses it, also without a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=".:kernels/torch-ext${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.run_all --gpu "$@"
