"""A few families of those that ``make families`` sweeps: hybrids, states, odd caches, odd masks, classics."""

import logging

import pytest
import torch

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


def test_a_model_that_cannot_be_decoded_is_refused_before_anything_is_made_with_it() -> None:
    from saerl_fast.errors import SaerlError
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
