import pytest
import torch
from transformers.cache_utils import DynamicLayer

from saerl_fast.config import RolloutConfig
from saerl_fast.rl.cache import Growing, cache_argument, has_plain_layers, prompt_cache
from saerl_fast.rl.generate import generate
from tests.tiny_lm import char_tokenizer, tiny_model, token_rows


def states(rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 2, tokens, 4), torch.randn(rows, 2, tokens, 6)


def test_a_growing_layer_holds_what_a_plain_one_holds() -> None:
    ours, theirs = Growing(room=3), DynamicLayer()
    assert ours.get_seq_length() == 0
    for layer_rows, tokens in ((2, 5), (6, 1), (3, 1), (3, 1)):
        new = states(layer_rows, tokens)
        if tokens == 5:
            steps = ("batch_repeat_interleave", 3)
        else:
            steps = ("batch_select_indices", torch.arange(0, layer_rows, 2 if layer_rows == 6 else 1))
        for found, wanted in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert found.equal(wanted)
        for layer in (ours, theirs):
            getattr(layer, steps[0])(steps[1])
        assert ours.keys.equal(theirs.keys) and ours.values.equal(theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)


def test_a_step_copies_nothing() -> None:
    layer = Growing(room=2)
    layer.update(*states(2, 5))
    layer.batch_repeat_interleave(2)
    place = layer.keys.data_ptr()
    layer.update(*states(4, 1))
    assert layer.keys.data_ptr() == place and layer.keys.shape == (4, 2, 6, 4)


@pytest.mark.parametrize(("kind", "plain"), [("llama", True), ("gpt2", True), ("gemma2", False)])
def test_only_plain_layers_are_exchanged(kind: str, plain: bool) -> None:
    model = tiny_model(kind)
    found = [type(layer) is Growing for layer in prompt_cache(model, 4).layers]
    assert has_plain_layers(model) == all(found) == plain


@pytest.mark.parametrize("decode", ["dynamic", "static"])
def test_what_a_layer_keeps_beside_its_states_does_not_matter(decode: str, monkeypatch) -> None:
    """As in transformers 5.24, whose layers have no `dtype`."""
    real = DynamicLayer.lazy_initialization

    def renamed(self, *args):
        real(self, *args)
        self.__dict__.pop("dtype", None)

    model, cfg = tiny_model(), RolloutConfig(group_size=2, max_new_tokens=6, decode=decode)
    wanted = generate(model, char_tokenizer(), token_rows(["1+1=", "a"]), cfg)
    monkeypatch.setattr(DynamicLayer, "lazy_initialization", renamed)
    found = generate(model, char_tokenizer(), token_rows(["1+1=", "a"]), cfg)
    assert found.completion_ids.equal(wanted.completion_ids)


def test_the_cache_goes_by_the_name_that_the_model_has_for_it() -> None:
    class Model:
        def __init__(self, forward) -> None:
            self.forward = forward

    new, old = Model(lambda input_ids, cache=None: None), Model(lambda input_ids, past_key_values=None: None)
    adapted = Model(lambda *args, **kwargs: None)
    adapted.get_base_model = lambda: new
    assert set(cache_argument(new, 1)) == set(cache_argument(adapted, 1)) == {"cache", "use_cache"}
    assert cache_argument(old, 1) == {"past_key_values": 1, "use_cache": True}
