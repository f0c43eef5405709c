from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from saerl_fast.config import RolloutConfig
from saerl_fast.rl.cache import (
    Growing,
    cache_argument,
    caller,
    has_plain_layers,
    holds_tokens,
    own_cache,
    prompt_cache,
    repeat_rows,
    take_rows,
)
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


class Strange:
    """A cache layer or a whole cache of another making."""

    def __init__(self, rows: int) -> None:
        part = torch.arange(float(rows))[:, None]
        self.conv, self.states = part, {0: part + 10, 1: None}
        self.nested, self.pair = [part + 20, [part + 30]], (part + 40, "x")
        self.kernel, self.count = torch.zeros(3, 1), rows

    def found(self) -> list[list[float]]:
        parts = (self.conv, self.states[0], self.nested[0], self.nested[1][0], self.pair[0])
        return [[float(v) % 10 for v in part[:, 0]] for part in parts]


@pytest.mark.parametrize("as_layer", [True, False])
def test_what_is_unknown_is_expanded_by_its_tensors(as_layer: bool) -> None:
    strange = Strange(2)
    whole = DynamicCache() if as_layer else strange
    if as_layer:
        whole.layers = [strange]
    repeat_rows(whole, 2, 3)
    assert strange.found() == [[0, 0, 0, 1, 1, 1]] * 5
    assert strange.kernel.shape == (3, 1) and strange.states[1] is None and strange.pair[1] == "x"
    take_rows(whole, 6, torch.tensor([1, 5]))
    assert strange.found() == [[0, 1]] * 5


def test_caches_of_tensors_alone() -> None:
    state = [torch.arange(2.0)[:, None], torch.arange(2.0)[:, None] + 5]
    repeat_rows(state, 2, 2)
    assert [part[:, 0].tolist() for part in state] == [[0, 0, 1, 1], [5, 5, 6, 6]]


def test_states_have_no_tokens_that_a_mask_could_hide() -> None:
    cache = DynamicCache()
    cache.layers = [Strange(2)]
    assert not holds_tokens(cache) and holds_tokens([torch.zeros(1)])
    cache.update(*states(2, 5), 1)
    assert holds_tokens(cache)


def test_a_model_is_handed_what_it_takes() -> None:
    class Model:
        def forward(self, input_ids, cache_params=None) -> dict:
            return {"input_ids": input_ids, "cache_params": cache_params}

        def __call__(self, **inputs):
            return self.forward(**inputs)

    model = Model()
    assert cache_argument(model, 7) == {"cache_params": 7, "use_cache": True}
    assert caller(model)(input_ids=1, position_ids=2) == {"input_ids": 1, "cache_params": None}
    made = SimpleNamespace(cache_params=3, past_key_values=4)
    assert own_cache(model, made) == {"cache_params": 3, "use_cache": True}
    with pytest.raises(TypeError, match="returns no cache"):
        own_cache(model, SimpleNamespace())
