"""The snippets of kernels/USE.md, run in order, against what they say."""

from __future__ import annotations

import contextlib
import linecache
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import saerl_kernels as sk

PAGE = (Path(__file__).resolve().parents[1] / "kernels/USE.md").read_text()
D_IN, D_SAE, K = 16, 96, 6


def run(title: str, **names: Any) -> dict:
    """The names after the section's snippets have run with ``names``."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    snippets = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert snippets
    for place, snippet in enumerate(snippets):
        name = f"<{title} {place}>"
        linecache.cache[name] = (len(snippet), None, snippet.splitlines(True), name)  # nnsight reads it
        exec(compile(snippet, name, "exec"), names)
    return names


def weights() -> tuple[torch.Tensor, ...]:
    return torch.randn(D_IN, D_SAE), torch.randn(D_SAE), torch.randn(D_SAE, D_IN), torch.randn(D_IN)


def test_saelens():
    topk = pytest.importorskip("sae_lens.saes.topk_sae")
    sae = topk.TopKSAE(topk.TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, device="cpu"))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn_like(parameter))
        x = torch.randn(5, D_IN)
        dense, restored = sae.encode(x), sae(x)
        names = run("SAELens", sae=sae, activations=x)
        torch.testing.assert_close(sae.encode(x), dense, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(names["restored"], restored, rtol=1e-4, atol=1e-4)
        seen = []
        sae.hook_sae_acts_post.register_forward_hook(lambda *args: seen.append(args))
        sae(x)
        assert seen


@pytest.mark.parametrize("skip", [False, True])
def test_sparsify(skip):
    W, b, D, c = weights()
    coder = SimpleNamespace(encoder=SimpleNamespace(weight=W.t(), bias=b), W_dec=D, b_dec=c, W_skip=None)
    coder.cfg = SimpleNamespace(k=K)
    with contextlib.suppress(ImportError):
        from sparsify import SparseCoder, SparseCoderConfig

        config = SparseCoderConfig(num_latents=D_SAE, k=K, skip_connection=skip, transcode=False)
        real = SparseCoder(D_IN, config)
        assert {"encoder", "W_dec", "b_dec", "W_skip", "cfg"} <= set(dir(real))
        assert real.encoder.weight.shape == (D_SAE, D_IN) and real.cfg.k == K
    if skip:
        coder.W_skip = torch.randn(D_IN, D_IN)
    x = torch.randn(5, D_IN)
    names = run("sparsify", coder=coder, activations=x)
    code = sk.reference.topk(torch.relu((x - c) @ W + b), K).to_dense(D_SAE)
    torch.testing.assert_close(names["restored"], code @ D + c, rtol=1e-4, atol=1e-4)
    code = sk.reference.topk(torch.relu(x @ W + b), K).to_dense(D_SAE)
    want = code @ D + c + (x @ coder.W_skip.mT if skip else 0)
    torch.testing.assert_close(names["outputs"], want, rtol=1e-4, atol=1e-4)


class Saved(torch.Tensor):
    def save(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_nnsight():
    W, b, _, _ = weights()
    packed, hidden = sk.pack_encoder(W, b), torch.randn(1, 7, D_IN)
    block = torch.nn.Identity()
    try:
        from nnsight import NNsight

        model: Any = NNsight(torch.nn.Sequential(block))
        layer, prompt = model[0], hidden[None]
    except ImportError:
        model = SimpleNamespace(trace=lambda prompt: contextlib.nullcontext())
        layer, prompt = SimpleNamespace(output=(hidden.as_subclass(Saved),)), hidden
    names = run("nnsight", model=model, layer=layer, prompt=prompt, packed=packed, k=K)
    want = sk.reference.encode_pool(hidden[0], [0, 7], packed, K)
    torch.testing.assert_close(names["features"].to_dense(), want.to_dense(), rtol=1e-4, atol=1e-5)


def test_parts(tmp_path):
    import torch.distributed as dist

    packed, x = sk.pack_encoder(torch.randn(D_IN, 2048), torch.randn(2048)), torch.randn(5, D_IN)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        names = run("Parts of a dictionary", packed=packed, activations=x, shard=packed, first=0, k=K)
    finally:
        dist.destroy_process_group()
    assert int(names["some"].indices()[1].max()) < 1024
    assert torch.equal(names["kept"].indices, sk.encode_topk(x, packed, K).indices)
