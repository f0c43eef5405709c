"""The count of SAELens' list goes through the same code as ``--sae``."""

from __future__ import annotations

import pytest


@pytest.mark.filterwarnings("ignore")
def test_a_few_entries_of_some_releases_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sae_lens")
    from benchmarks import sae_list
    from saerl_fast.sae import hub

    names = ["gemma-scope-2b-pt-res", "gemma-scope-2b-pt-att", "qwen-scope-3-8b-base-w64k-l50"]
    names += ["gemma-scope-2-1b-pt-mlp", "gemma-scope-2-270m-it-transcoders", "gpt2-small-res-jb"]
    names += ["sae_bench_pythia70m_sweep_gated_ctx128_0730", "llama_scope_r1_distill"]
    some = {name: hub._releases()[name] for name in names}
    monkeypatch.setattr(hub, "_releases", lambda: some)
    assert sae_list.count(limit=2) == {
        ("gemma_2", "residual stream"): 2,
        ("gemma_2", "refused: hook_z"): 2,
        ("qwen_scope", "residual stream"): 2,
        ("gemma_3", "another place"): 2,
        ("gemma_3", "refused: transcoder"): 2,
        ("sae_lens", "residual stream"): 2,
        ("dictionary_learning_1", "residual stream"): 2,
        ("llama_scope_r1_distill", "residual stream"): 2,
    }
