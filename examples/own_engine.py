"""An engine of your own for the rollouts, in one file: here a server with SGLang's HTTP interface.

    python -m sglang.launch_server --model-path MODEL --enable-deterministic-inference
    SERVER=http://127.0.0.1:30000 saerl train ... train.rollout.engine=examples/own_engine.py:ServerEngine

After every update the weights go over by the folder $WEIGHTS, which the server must be able to read. What
comes back is checked: that it keeps to the contract, and has the policy's log-probabilities. Written after
the sources of SGLang 0.5.23 and tested with a stand-in for its server; not run with SGLang itself.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from safetensors.torch import save_file
from torch import Tensor

from saerl_fast import Engine, Sample


class ServerEngine(Engine):
    name = "the server"

    def __init__(self, model: Any, cfg: Any) -> None:
        self.url = os.environ.get("SERVER", "http://127.0.0.1:30000")
        self.folder = Path(os.environ.get("WEIGHTS", "weights")).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        model.config.save_pretrained(self.folder)
        for path in Path(model.name_or_path).glob("*token*"):
            shutil.copy(path, self.folder)

    def load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in weights}
        save_file(tensors, self.folder / "model.safetensors", {"format": "pt"})
        told = self._post("update_weights_from_disk", {"model_path": str(self.folder), "flush_cache": True})
        if not told["success"]:
            raise RuntimeError(told["message"])

    def sample(
        self, prompts: Sequence[list[int]], cfg: Any, seeds: Sequence[int], stops: Sequence[int]
    ) -> list[list[Sample]]:
        common = {"temperature": cfg.temperature, "top_p": cfg.top_p, "max_new_tokens": cfg.max_new_tokens}
        common |= {"stop_token_ids": list(stops), "no_stop_trim": True}
        size = (
            cfg.group_size
        )  # one request for each completion: with n of them the server uses one seed for all
        asked = {
            "input_ids": [list(row) for row in prompts for _ in range(size)],
            "sampling_params": [common | {"sampling_seed": seed + g} for seed in seeds for g in range(size)],
            "return_logprob": True,
        }
        found = [one["meta_info"]["output_token_logprobs"] for one in self._post("generate", asked)]
        samples = [Sample([t for _, t, *_ in one], [p for p, *_ in one]) for one in found]
        return [samples[i : i + size] for i in range(0, len(samples), size)]

    def _post(self, what: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        with urlopen(Request(f"{self.url}/{what}", data, {"content-type": "application/json"})) as answer:
            return json.load(answer)
