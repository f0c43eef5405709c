"""What the tests of SAE files share: small SAEs, dense codes, and SAELens reading the same files."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from saerl_fast.sae.model import SAE, SAESpec
from saerl_fast.sae.train import _Trainer
from saerl_kernels import TopK

D_IN, D_SAE = 12, 40


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """W_enc, b_enc, W_dec and b_dec in SAELens' shapes."""
    gen = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    return {name: torch.randn(shape, generator=gen) for name, shape in shapes.items()}


def threshold() -> torch.Tensor:
    return torch.rand(D_SAE, generator=torch.Generator().manual_seed(9)) * 3


def make(architecture: str = "topk", **cfg: Any) -> SAE:
    limit = threshold() if architecture in ("jumprelu", "batchtopk", "gated") else None
    cfg.setdefault("k", 4)
    return SAE(**tensors(), threshold=limit, cfg=SAESpec(architecture, **cfg))


def dense(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    codes = sae.encode(x)
    return codes.to_dense(sae.d_sae) if isinstance(codes, TopK) else codes.to_dense()


def assert_equal(ours: SAE, theirs: Any, x: torch.Tensor | None = None) -> None:
    """The same features are active, with the same values and the same reconstruction."""
    x = 2 * torch.randn(64, ours.d_in) + 0.5 if x is None else x
    with torch.no_grad():
        want, recon = theirs.encode(x), theirs(x)
    got = dense(ours, x)
    assert (want != 0).any() and torch.equal(got != 0, want != 0)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours(x).detach(), recon, atol=1e-3, rtol=1e-3)


def serve(monkeypatch: pytest.MonkeyPatch, root: Path) -> Any:
    """SAELens' loaders with ``root`` in the place of every hub repository."""
    pytest.importorskip("sae_lens")
    from huggingface_hub.errors import EntryNotFoundError
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def download(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        path = root / (subfolder or "") / filename
        if not path.is_file():
            raise EntryNotFoundError(f"no {path}")
        return str(path)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        from safetensors.torch import load_file

        return {name: list(tensor.shape) for name, tensor in load_file(root / filename).items()}

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    return loaders


def by_saelens(loaders: Any, kind: str, repo: str, folder: str, scale: float | None = None) -> Any:
    """SAELens' own SAE of what one of its loaders reads, at the sizes of these tests."""
    from sae_lens import SAE as Theirs

    sizes = {"d_in": D_IN, "d_sae": D_SAE, "device": "cpu", "dtype": "float32"}
    loader = loaders.NAMED_PRETRAINED_SAE_LOADERS[kind]
    config, state, _ = loader(
        repo_id=repo, folder_name=folder, device="cpu", force_download=False, cfg_overrides=sizes
    )
    config = loaders.handle_config_defaulting(config)
    cfg = Theirs.get_sae_config_class_for_architecture(config["architecture"]).from_dict(config)
    sae = Theirs.get_sae_class_for_architecture(cfg.architecture())(cfg)
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)
    if scale is not None:
        sae.fold_activation_norm_scaling_factor(scale)
    return sae


def interrupted_after(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Ctrl-C at the ``number``-th training step of an SAE; the numbers of all steps that are made."""
    real, steps = _Trainer.step, []

    def step(self: _Trainer, at: int) -> Any:
        steps.append(at)
        if len(steps) == number:
            signal.raise_signal(signal.SIGINT)
        return real(self, at)

    monkeypatch.setattr(_Trainer, "step", step)
    return steps
