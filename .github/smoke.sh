#!/usr/bin/env bash
# An installed wheel, away from the sources: the kernels alone, then the demo that it brings along, cut short.
# Usage, in an empty folder: bash smoke.sh BIN_FOLDER
set -euo pipefail
bin=$1
"$bin/python" - <<'PYTHON'
import torch
from saerl_kernels import encode_topk, pack_encoder

found = encode_topk(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), pack_encoder(torch.eye(4)), 2)
assert found.indices.tolist() == [[1, 2]], found
PYTHON
"$bin/saerl" --help > /dev/null
"$bin/saerl" demo --run-dir runs/smoke train.steps=2 sae.steps=20 difficulty.n_labels=16 data.limit=200 \
	train.eval.every=2 compare.seeds=0
test -s runs/smoke/report.html
