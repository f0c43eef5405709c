#!/usr/bin/env bash
# What wants a GPU, in pieces below 9 minutes each; call the same line again and again until nothing is left.
#   bash benchmarks/gpu.sh --out FOLDER                          smoke test, tuning, kernels' benchmarks, tests (gpu.py)
#   bash benchmarks/gpu.sh training --model MODEL --out FOLDER   orders compared on a language model (language.py)
# SAERL_BENCH_GRID=tiny rehearses the first, also without a GPU; tests/test_language.py the second.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=".:kernels/torch-ext${PYTHONPATH:+:$PYTHONPATH}"
if [ "${1:-}" = training ]; then
    shift
    exec "${PYTHON:-python3}" -m benchmarks.language --size gpu --seconds 480 "$@"
fi
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
