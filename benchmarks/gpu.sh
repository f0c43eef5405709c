#!/usr/bin/env bash
# Correctness, tuning and the encode grid on the GPU at hand; results under benchmarks/results/<gpu>/.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=".:kernels/torch-ext${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-python3}
device=$("$PYTHON" -c "import torch; print(torch.cuda.get_device_name().replace(' ', '-').lower())")
mkdir -p "benchmarks/results/$device"
"$PYTHON" -m pytest -q tests/test_encode.py tests/test_encode_gpu.py tests/test_chunked.py tests/test_topk.py tests/test_pool.py tests/test_decode.py
"$PYTHON" -m benchmarks.tune_encode "${TUNE_SECONDS:-150}"
"$PYTHON" -m pytest -q benchmarks/bench_encode.py --benchmark-json="benchmarks/results/$device/encode.json"
