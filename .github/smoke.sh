#!/usr/bin/env bash
# An installed wheel, away from the sources: the kernels alone, then the whole pipeline for two steps of the demo.
# Usage, beside a copy of examples/: bash smoke.sh BIN_FOLDER
set -euo pipefail
bin=$1
"$bin/python" - <<'PYTHON'
import torch
from saerl_kernels import encode_topk, pack_encoder

found = encode_topk(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), pack_encoder(torch.eye(4)), 2)
assert found.indices.tolist() == [[1, 2]], found
PYTHON
"$bin/saerl" --help > /dev/null
"$bin/saerl" train --config examples/demo.yaml --run-dir runs/smoke train.steps=2 sae.steps=20 difficulty.n_labels=16 \
	data.limit=200 train.eval.every=2
test -s runs/smoke/*/metrics.jsonl || test -s runs/smoke/metrics.jsonl
