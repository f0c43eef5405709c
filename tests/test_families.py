"""A few families of those that ``make families`` sweeps: hybrids, states, odd caches, odd masks, classics."""

import json
import logging
from typing import Any

import pytest
import torch

from saerl_fast.errors import SaerlError
from saerl_fast.rl.logprobs import check_gradient
from tests import families
from tests.families import judge, tiny_family, verdict


@pytest.fixture(autouse=True)
def one_thread():  # many small operations: threads would mostly wait for each other
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


PADDED, READY = "on a cache of padded prompts", "on a cache with ready-made masks"
EXPECTED = {
    "gpt2": READY,
    "mamba2": PADDED,
    "qwen3_5_text": PADDED,
    "falcon_h1": PADDED,
    "granitemoehybrid": PADDED,
    "lfm2": PADDED,
    "llama4_text": PADDED,
    "falcon-alibi": PADDED,  # refuses ready-made masks
    "minimax": "on the model's own cache of padded prompts",
    "recurrent_gemma": "without a cache (slow)",  # keeps states in its modules
    "roberta": "without a cache (slow)",  # counts its positions from the pad token's number
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_family_is_right_in_the_way_that_suits_it(name: str) -> None:
    pytest.importorskip(f"transformers.models.{name.partition('-')[0].removesuffix('_text')}")
    report = judge(tiny_family(name))
    assert verdict(report) == "right", report
    assert report["decoding"] == EXPECTED[name]


@pytest.mark.parametrize("name", ["gpt_neo", "mpt"])
def test_families_whose_prompts_cannot_be_shared_say_so(name: str, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        report = judge(tiny_family(name))
    assert verdict(report) == "right", report
    assert "sharing a prompt's forward pass is off by" in caplog.text


def test_a_model_without_one_residual_stream_trains_but_is_not_captured() -> None:
    pytest.importorskip("transformers.models.gemma3n")
    report = judge(tiny_family("gemma3n_text"))
    assert verdict(report) == "right" and "not one residual stream of width 32" in report["capture"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"num_key_value_heads": 1, "head_dim": 12}),
        ("llama", {"tie_word_embeddings": True, "vocab_size": 128, "attention_dropout": 0.5}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
        ("gemma2", {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0}),
        ("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
        ("dots3_note_text", {}),  # sparse attention: an indexer picks 6 keys
    ],
)
def test_settings_that_models_come_with(name: str, settings: dict) -> None:
    pytest.importorskip(f"transformers.models.{name.removesuffix('_text')}")
    report = judge(tiny_family(name, **settings))
    assert verdict(report) == "right" and "off by" not in str(report["capture"]), report


def test_a_model_of_frozen_parts_is_right() -> None:
    model = tiny_family("llama")
    model.lm_head.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    assert verdict(judge(model)) == "right"


def test_a_model_without_a_backward_pass_is_refused_before_it_is_trained() -> None:
    with pytest.raises(SaerlError, match="Reformer.* cannot be trained: its backward pass failed"):
        check_gradient(tiny_family("reformer"))
    check_gradient(tiny_family("ctrl"))  # scales its embeddings in place


def test_a_sweep_goes_on_from_its_file_unless_the_code_is_another(tmp_path, monkeypatch, capsys) -> None:
    out, tried = tmp_path / "families.json", []

    def known(model: Any) -> dict[str, Any]:
        tried.append(model.config.model_type)
        return {"capture": 0.0, "generate": 1.0 if tried[-1] == "gpt2" else 0.0}

    monkeypatch.setattr(families, "judge", known)
    monkeypatch.setattr(families, "families", lambda: ["llama", "gpt2"])
    assert families.main(["--out", str(out), "llama"]) == 0 and tried == ["llama"]
    assert families.main(["--out", str(out)]) == 1 and tried == ["llama", "gpt2"]
    kept = json.loads(out.read_text())
    assert kept["counts"] == {"WRONG": 1, "right": 1} and len(kept["families"]) == 2
    out.write_text(json.dumps(kept | {"code": "of before"}))
    assert families.main(["--out", str(out), "llama"]) == 0 and len(tried) == 3
    assert [row["family"] for row in json.loads(out.read_text())["families"]] == ["llama"]


def test_a_model_that_cannot_be_decoded_is_refused_before_anything_is_made_with_it() -> None:
    from saerl_fast.rl.generate import prove
    from tests.tiny_lm import char_tokenizer

    prove(tiny_family("llama"), char_tokenizer())
    model = tiny_family("llama")
    model.register_forward_hook(_noisy, with_kwargs=True)
    with pytest.raises(SaerlError, match="LlamaForCausalLM cannot be decoded: is off by"):
        prove(model, char_tokenizer())


def _noisy(module, args, kwargs, output):
    """Logits that depend on how many tokens were read at once."""
    output.logits = output.logits * (1 + kwargs["input_ids"].shape[1])
    return output
