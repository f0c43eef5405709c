"""SparseEncoder: state_dict, moves, hooks, outputs and slices."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import saerl_kernels as sk
from tests.encoders import BACKENDS, assert_equal, integers


@pytest.mark.parametrize("permute", [True, False])
def test_outputs_say_the_same(permute):
    x, encoder = integers(6, 9, 70, permute=permute)
    want = sk.reference.encode_topk(x, encoder, 5)
    assert_equal(sk.SparseEncoder(encoder, 5)(x), want)
    dense = want.to_dense(70).view(2, 3, 70)
    for output in ("dense", "coo"):
        got = sk.SparseEncoder(encoder, 5, output=output)(x.view(2, 3, 9))
        assert got.shape == (2, 3, 70) and torch.equal(got if output == "dense" else got.to_dense(), dense)
    csr = sk.SparseEncoder(encoder, 5, output="csr")(x.view(2, 3, 9))
    assert torch.equal(csr.to_dense(), dense.view(6, 70)) and bool((csr.values > 0).all())
    for row in range(6):
        assert bool((csr.indices[csr.indptr[row] : csr.indptr[row + 1]].diff() > 0).all())


def test_threshold():
    x, encoder = integers(6, 9, 70, threshold=3.0)
    want = sk.reference.encode_threshold(x, encoder)
    got = sk.SparseEncoder(encoder, output="csr")(x)
    assert torch.equal(got.to_dense(), want.to_dense())
    assert torch.equal(sk.SparseEncoder(encoder, output="coo")(x).to_dense(), want.to_dense())


@pytest.mark.parametrize("permute", [True, False])
def test_state_dict_is_in_the_original_numbering(permute):
    x, encoder = integers(6, 9, 70, permute=permute, threshold=1.0)
    first = sk.SparseEncoder(encoder, 5)
    state = first.state_dict()
    assert set(state) == {"weight", "bias", "threshold"}
    assert torch.equal(state["weight"], encoder.natural().weight)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    _, other = integers(6, 9, 70, seed=8, permute=not permute, threshold=7.0)
    second = sk.SparseEncoder(other, 5)
    before = sk.encode_topk(x, other, 5)
    second(x)  # fills caches that must not survive the load
    second.load_state_dict(torch.load(file, weights_only=True))
    assert_equal(second(x), first(x))
    assert_equal(sk.encode_topk(x, other, 5), before)  # the encoder it was made of is as it was
    for again in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert_equal(again(x), first(x))
    assert second.packed().permutation is None or permute is False


def test_moves_keep_the_bias_wide(device):
    x, encoder = integers(6, 9, 70, permute=True)
    encoder.bias.add_(2.0**-12)  # which bfloat16 would lose
    module = sk.SparseEncoder(encoder, 5).to(torch.bfloat16).to(device)
    assert module.weight.dtype == torch.bfloat16 and module.bias.dtype == torch.float32
    assert_equal(module(x.to(device)), sk.reference.encode_topk(x, encoder, 5))
    assert torch.equal(module.state_dict()["bias"].cpu(), encoder.natural().bias)
    module.float()
    assert module.weight.dtype == torch.float32
    assert "k=5" in repr(module)


@pytest.mark.parametrize("permute", [False, True], ids=["natural", "permuted"])
def test_what_is_loaded_or_moved_is_settled(permute):
    """A weight that is transposed, float64 or of a dtype no kernel takes; a bias that came in narrow."""
    x, encoder = integers(6, 9, 70, permute=permute)
    want = sk.reference.encode_topk(x, encoder, 5)
    plain = encoder.natural()
    columns = torch.stack([plain.bias, plain.bias + 9], 1)
    for state in (
        {"weight": plain.weight.t().contiguous().t(), "bias": columns[:, 0]},
        {"weight": torch.nn.Parameter(plain.weight), "bias": torch.nn.Parameter(plain.bias)},
        {name: getattr(plain, name).half() for name in ("weight", "bias")},
        {name: getattr(plain, name).double() for name in ("weight", "bias")},
    ):
        for backend in BACKENDS:
            module = sk.SparseEncoder(
                sk.pack_encoder(torch.zeros(9, 70), permute=permute), 5, backend=backend
            )
            module.load_state_dict(state, assign=True)
            assert_equal(module(x), want)
            assert module.weight.is_contiguous() and module.bias.dtype == torch.float32
            assert module.weight.dtype == (
                torch.float16 if state["bias"].dtype == torch.float16 else torch.float32
            )
    module = sk.SparseEncoder(encoder, 5).double()
    assert module.weight.dtype == torch.float32 and module.packed() is module.packed()
    assert_equal(module(x), want)
    with pytest.raises(ValueError, match="float8_e4m3fn is not supported"):
        module.to(torch.float8_e4m3fn)
    assert_equal(module(x), want)
    module.weight, module.bias = torch.nn.Parameter(plain.weight.t().contiguous().t()), columns[:, 0]
    module.permutation = None
    assert module.packed() is module.packed()  # made once, and so is what it keeps
    assert_equal(module(x), want)


def test_inside_a_model_with_hooks():
    x, encoder = integers(6, 9, 70)
    model = torch.nn.Sequential(torch.nn.Identity(), sk.SparseEncoder(encoder, 5, output="dense"))
    seen = []
    model[1].register_forward_hook(lambda module, args, out: seen.append(out) or out * 2)
    got = model(x)
    assert torch.equal(got, 2 * seen[0]) and set(model.state_dict()) == {"1.weight", "1.bias"}


@pytest.mark.parametrize("features", [slice(10, 40), range(3, 60, 7), torch.tensor([2, 5, 66])], ids=str)
def test_a_slice_of_latents(features):
    x, encoder = integers(6, 9, 70, permute=True)
    module = sk.SparseEncoder(encoder, 2, features=features, output="dense")
    plain = encoder.natural()
    chosen = torch.arange(70)[features] if isinstance(features, slice) else torch.as_tensor(features)
    part = sk.PackedEncoder(plain.weight[chosen], plain.bias[chosen])
    want = torch.zeros(6, 70)
    want[:, chosen] = sk.reference.encode_topk(x, part, 2).to_dense(len(chosen))
    assert torch.equal(module(x), want)


def test_refusals():
    _, encoder = integers(2, 9, 70)
    for arguments, message in (
        ({"k": 3, "output": "list"}, "output='list'"),
        ({}, "needs a threshold"),
        ({"k": 3, "features": torch.tensor([4, 4])}, "must rise"),
        ({"k": 3, "features": torch.tensor([4, 70, 71])}, "outside"),
        ({"k": 3, "features": torch.tensor([4.0])}, "integers"),
        ({"k": 3, "features": slice(0, 2)}, "the number of features=2"),
    ):
        with pytest.raises(ValueError, match=message):
            sk.SparseEncoder(encoder, **arguments)


def test_another_threshold_is_taken():
    x, encoder = integers(6, 9, 70, threshold=0.0)
    module = sk.SparseEncoder(encoder, output="csr")
    assert module(x).nnz
    module.threshold = torch.full((70,), 1e9)
    assert not module(x).nnz
