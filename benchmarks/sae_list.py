"""How many of the SAEs on SAELens' list ``--sae`` takes, counted without a network.

Every entry of ``sae_lens/pretrained_saes.yaml`` goes through ``saerl_fast.sae.hub`` and SAELens' own loader,
which is served tiny files of that loader's layout in place of the hub's: so names, flags and overrides of the
list are the real ones, the tensors are not. What the list does not say stands in files that are not here:
for ``dictionary_learning_1`` the class is taken from the release's name, and SAELens' own format gets an old
configuration with the hook of the entry's id. An entry counts as taken when the SAE is built; those that read
another place than a residual stream need sae.layer.

    python -m benchmarks.sae_list
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file

from saerl_fast.errors import SaerlError
from saerl_fast.sae import hub, saelens

D_IN, D_SAE = 8, 512  # more features than the largest k on the list
Row = tuple[str, str]  # loader, what became of it


def tensors() -> dict[str, torch.Tensor]:
    """W_enc, b_enc, W_dec and b_dec."""
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


class Files:
    """Stands in for ``hf_hub_download`` and ``get_safetensors_tensor_shapes`` of SAELens' loaders."""

    def __init__(self, root: Path) -> None:
        self.root, self.sae, self.release = root, {"id": "", "path": ""}, ""
        parts, limit = tensors(), {"threshold": torch.rand(D_SAE)}
        turned = {name: parts[name].t().contiguous() for name in ("W_enc", "W_dec")}
        low = {name.replace("W_", "w_"): tensor for name, tensor in parts.items()} | limit
        linear = {"encoder.weight": turned["W_enc"], "encoder.bias": parts["b_enc"]}
        linear |= {"decoder.weight": turned["W_dec"]}
        both = linear | {"decoder.bias": parts["b_dec"]}
        np.savez(root / "params.npz", **{k: v.numpy() for k, v in (parts | limit).items()})
        save_file(low, root / "low.safetensors")
        save_file(low | {"affine_skip_connection": torch.ones(D_IN, D_IN)}, root / "affine.safetensors")
        save_file(parts, root / "saelens.safetensors")
        save_file(both, root / "linear.safetensors")
        save_file(both | {"log_jumprelu_threshold": limit["threshold"]}, root / "r1.safetensors")
        torch.save(both, root / "linear.pt")
        torch.save({k.replace(".", "_linear."): v for k, v in both.items()}, root / "goodfire.pt")
        torch.save(parts | turned, root / "qwen.pt")
        torch.save(parts | {"threshold": torch.tensor(0.5), "k": torch.tensor(5)}, root / "ae.pt")
        gate = {f"{name}_bias": torch.randn(D_SAE) for name in ("gate", "mag")} | {
            "r_mag": torch.randn(D_SAE)
        }
        no_bias = {name: tensor for name, tensor in linear.items() if name != "encoder.bias"}
        torch.save(no_bias | gate | {"decoder_bias": parts["b_dec"]}, root / "gated.pt")
        self.kind = ""

    def download(self, repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        """A local file with the layout of the one asked for."""
        from huggingface_hub.errors import EntryNotFoundError

        name = f"{subfolder or ''}/{filename}"
        if name.endswith(".json"):
            file = self.root / Path(name).name  # SAELens reads cfg.json from its folder
            file.write_text(json.dumps(self._config(Path(name).name)))
            return str(file)
        affine = "affine" if "affine" in name else "low"
        found = {
            "gemma_2": "params.npz",
            "gemma_3": f"{affine}.safetensors",
            "llama_scope": "linear.safetensors",
            "llama_scope_r1_distill": "r1.safetensors",
            "qwen_scope": "qwen.pt",
            "goodfire": "goodfire.pt",
            "deepseek_r1": "linear.pt",
            "dictionary_learning_1": "gated.pt" if "gated" in self.release else "ae.pt",
            "sae_lens": "saelens.safetensors",
        }.get(self.kind)
        if found is None or "sparsity" in filename:
            raise EntryNotFoundError(f"no file like {name} here")
        return str(self.root / found)

    def shapes(self, repo_id: str, filename: str) -> dict[str, list[int]]:
        """As in the files of Gemma Scope 2."""
        return {"w_enc": [D_IN, D_SAE], "w_dec": [D_SAE, D_IN]}

    def _config(self, name: str) -> dict[str, Any]:
        number = re.search(r"(\d+)", str(self.sae["path"]))
        layer = int(number[1]) if number else 0
        hook = re.search(r"blocks\.\d+\.[\w.]*hook_\w*?(?=_\d|$)", str(self.sae["id"]))
        if self.kind == "gemma_3":
            affine = "affine" in str(self.sae["path"])
            return {"architecture": "jump_relu", "model_name": "google/x", "affine_connection": affine}
        if self.kind.startswith("llama_scope"):
            sizes = {"d_model": D_IN, "d_sae": D_SAE, "expansion_factor": D_SAE // D_IN}
            sublayer = re.search(r"lx([a-z])_", self.release)
            place = {"m": "mlp_out", "a": "attn_out"}.get(sublayer[1] if sublayer else "r", "resid_post")
            more = {"jump_relu_threshold": 0.5, "dataset_average_activation_norm": {"in": 5.0, "out": 5.0}}
            return sizes | more | {"hook_point_in": f"blocks.{layer}.hook_{place}"}
        if self.kind == "dictionary_learning_1":
            classes = {"matryoshka": "MatryoshkaBatchTopKSAE", "batch_top_k": "BatchTopKSAE"}
            classes |= {"jump": "JumpReluAutoEncoder", "gated": "GatedAutoEncoder", "topk": "AutoEncoderTopK"}
            kind = next((cls for key, cls in classes.items() if key in self.release.lower()), "BatchTopKSAE")
            sizes = {"activation_dim": D_IN, "dict_size": D_SAE, "lm_name": "x", "layer": layer, "k": 5}
            return {"trainer": sizes | {"dict_class": kind}, "buffer": {"ctx_len": 128}}
        old = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "model_name": "gpt2-small"}
        return old | {"hook_point": hook[0] if hook else f"blocks.{layer}.hook_resid_post"}


@contextmanager
def served(root: Path) -> Iterator[Files]:
    """SAELens' loaders reading tiny local files, at their sizes."""
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.loading import pretrained_saes_directory as directory

    files, known = Files(root), directory.get_config_overrides
    sizes = {"d_in": D_IN, "d_sae": D_SAE}

    def overrides(release: str, sae_id: str) -> dict[str, Any]:
        return known(release, sae_id) | sizes

    patches = [
        mock.patch.object(loaders, "hf_hub_download", files.download),
        mock.patch.object(loaders, "get_safetensors_tensor_shapes", files.shapes),
        mock.patch.object(directory, "get_config_overrides", overrides),
        mock.patch.object(hub, "_reachable", lambda endpoint: True),
        mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", False),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield files


def count(limit: int | None = None) -> Counter[Row]:
    """(loader, outcome) -> entries; ``limit``: entries of each release."""
    found: Counter[Row] = Counter()
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as files:
        for release, entry in hub._releases().items():
            files.kind, files.release = entry.get("conversion_func") or "sae_lens", release
            for files.sae in entry["saes"][:limit]:
                name = f"{release}:{files.sae['id']}"
                try:
                    config, weights, scale = hub.read(name)
                    sae = saelens.build(name, config, weights, scale=scale)
                    outcome = "another place" if sae.layer is None else "residual stream"
                except SaerlError as err:
                    outcome = "refused: " + ("transcoder" if "transcoder" in str(err) else _reason(str(err)))
                found[files.kind, outcome] += 1
    return found


def _reason(message: str) -> str:
    for word in ("hook_z", "temporal", "center_writing_weights", "no file like"):
        if word in message:
            return {"no file like": "transcoder"}.get(word, word)
    return message.split(": ", 1)[-1][:60]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--limit", type=int, help="entries of each release")
    found = count(parser.parse_args().limit)
    total = sum(found.values())
    for (kind, outcome), entries in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{kind:28} {outcome:40} {entries:6} {entries / total:7.1%}")
    taken = sum(entries for (_, outcome), entries in found.items() if not outcome.startswith("refused"))
    usable = sum(entries for (_, outcome), entries in found.items() if outcome == "residual stream")
    print(f"\nof {total}: taken {taken} ({taken / total:.1%}), ", end="")
    print(f"of which {usable} ({usable / total:.1%} of all) read a residual stream")


if __name__ == "__main__":
    main()
