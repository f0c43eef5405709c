import logging

import pytest
import torch

from saerl_fast.config import RolloutConfig
from saerl_fast.errors import SaerlError
from saerl_fast.rl import cache, logprobs, ways
from saerl_fast.rl.generate import generate
from saerl_fast.rl.ways import LADDER, Decoding, Proof, decoding, equal_lengths, telling_rows, tolerance
from tests.tiny_lm import char_tokenizer, tiny_model, token_rows

PROMPTS = token_rows(["1+1=", "what is two plus two?", "a", "z: 12"])
CFG = RolloutConfig(group_size=3, max_new_tokens=10)


def completions(model, prompts=PROMPTS, cfg=CFG, **options):
    made = generate(model, char_tokenizer(), prompts, cfg, seed=4, **options)
    return made.completion_ids.tolist(), made


def test_a_proof_holds_for_what_is_no_larger() -> None:
    proof = Proof()
    assert not proof.covers(1, 1)
    proof.extend(5, 2)
    proof.extend(3, 4)
    assert proof.covers(5, 4) and proof.covers(1, 0) and not proof.covers(6, 0) and not proof.covers(0, 5)


def test_rows_that_tell() -> None:
    starts, lengths = torch.tensor([5, 5, 2, 2, 9, 4]), torch.tensor([3, 8, 1, 6, 7, 2])
    assert telling_rows(starts, lengths).tolist() == [1, 3, 4, 5]


def test_prompts_of_one_length_go_together() -> None:
    assert equal_lengths([3, 0, 1, 2], [4, 2, 4, 4], 2) == [[3, 0], [2], [1]]


def test_the_tolerance_follows_dtype_and_temperature() -> None:
    model = tiny_model()
    assert tolerance(model) == tolerance(model, 0.0) == 1e-3 and tolerance(model, 0.5) == 2e-3
    assert tolerance(model.to(torch.bfloat16)) == 0.1


@pytest.mark.parametrize("step", range(1, len(LADDER)))
def test_every_way_samples_the_same(step: int) -> None:
    model = tiny_model()
    wanted, _ = completions(model)
    other = tiny_model()
    decoding(other, True).step = step
    found, made = completions(other)
    assert found == wanted and decoding(other, True).step == step
    ids, starts, lengths = made.sequences()
    again, _ = logprobs.completion_logprobs(other, ids, starts, lengths)
    torch.testing.assert_close(again.detach(), made.logprobs[made.completion_mask], atol=1e-5, rtol=1e-5)


def test_features_of_prompts_of_one_length_come_back_in_order() -> None:
    from saerl_fast.sae.capture import FeatureCapture
    from tests.test_capture import sae_for

    model = tiny_model()
    capture = FeatureCapture(model, sae_for(32, hook_layer=1), backend="torch")
    wanted = completions(model, capture=capture)[1].features
    decoding(model, True).step = 3
    found = completions(model, capture=capture)[1].features
    torch.testing.assert_close(found.to_dense(), wanted.to_dense(), atol=1e-4, rtol=1e-4)


def test_a_cache_that_mixes_up_its_rows_is_found_out_and_said_once(monkeypatch, caplog) -> None:
    wanted, _ = completions(tiny_model())
    real = cache.Growing.batch_repeat_interleave

    def wrong(self, repeats: int) -> None:
        self.states = tuple(part.flip(0) for part in self.states)
        real(self, repeats)

    monkeypatch.setattr(cache.Growing, "batch_repeat_interleave", wrong)
    model = tiny_model()
    with caplog.at_level(logging.WARNING):
        found, _ = completions(model)
        assert found == wanted
        completions(model)
    said = [record.message for record in caplog.records]
    assert len(said) == decoding(model, True).step == 2 and "with ready-made masks is off by" in said[0]


def test_what_a_longer_prompt_breaks_is_found_out_then(monkeypatch) -> None:
    wanted, _ = completions(tiny_model())
    real = cache.Growing.update

    def forgetful(self, key_states, value_states, *args, **kwargs):  # after 12 tokens
        keys, values = real(self, key_states, value_states, *args, **kwargs)
        return keys, torch.cat([values[:, :, :-12] * 0, values[:, :, -12:]], 2)

    monkeypatch.setattr(cache.Growing, "update", forgetful)
    model, short = tiny_model(), RolloutConfig(group_size=3, max_new_tokens=4)
    completions(model, token_rows(["1+1=", "a"]), short)
    assert decoding(model, True).step == 0
    found, _ = completions(model)
    assert decoding(model, True).step > 1 and found == wanted


def test_a_model_that_fails_in_one_way_goes_on_in_the_next(caplog) -> None:
    model = tiny_model()
    real = model.forward

    def picky(*args, **kwargs):
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 4:
            raise ValueError("too many values to unpack")
        return real(*args, **kwargs)

    wanted, _ = completions(tiny_model())
    model.forward = picky
    found, _ = completions(model)
    assert found == wanted and "failed (too many values to unpack); now decoding" in caplog.text


def test_a_model_that_reads_the_future_is_refused() -> None:
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    real = model.forward

    def peeking(input_ids=None, **kwargs):  # logits depend on the last token, wherever they are
        output = real(input_ids=input_ids, **kwargs)
        output.logits = output.logits * (1 + input_ids[:, -1:, None] % 7)
        return output

    model.forward = peeking
    with pytest.raises(SaerlError, match="cannot be decoded: is off by .* decoder-only"):
        completions(model)


def test_the_last_way_has_no_next() -> None:
    state = Decoding(False)
    state.step = len(LADDER) - 1
    with pytest.raises(SaerlError, match="Module cannot be decoded: failed"):
        state.give_up(torch.nn.Module(), "failed (x)")


def test_short_errors() -> None:
    assert ways.short(ValueError("one\ntwo")) == "one" and ways.short(KeyError()) == "KeyError"
