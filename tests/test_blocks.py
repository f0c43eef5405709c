import pytest
import torch

from saerl_fast.errors import SaerlError
from saerl_fast.sae.blocks import check_stream, forward_to
from saerl_fast.sae.capture import Capture
from tests.tiny_lm import tiny_model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_every_layer_of_a_plain_model_is_its_residual_stream(kind: str) -> None:
    model = tiny_model(kind).train()
    for layer in range(3):
        check_stream(model, layer)
    assert model.training
    ids = torch.tensor([[5, 6, 7]])
    shown = model.eval()(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(forward_to(model, 1, ids), shown[1])


def test_blocks_of_another_shape_or_content_are_refused() -> None:
    model = tiny_model()
    streams = model.model.layers[0].register_forward_hook(lambda m, a, out: torch.stack([out, out]))
    with pytest.raises(
        SaerlError, match="layer 1 of LlamaForCausalLM is .*, not one residual stream of width 32"
    ):
        Capture(model, 1)
    streams.remove()
    model = tiny_model()
    real = model.forward

    def other(*args, **kwargs):
        output = real(*args, **kwargs)
        if output.hidden_states is not None:
            output.hidden_states = tuple(state * 2 for state in output.hidden_states)
        return output

    model.forward = other
    with pytest.raises(SaerlError, match="block 1 of LlamaForCausalLM returns is not its hidden state"):
        check_stream(model, 1)
