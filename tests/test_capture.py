from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from saerl_fast.errors import SaerlError
from saerl_fast.models.layout import decoder
from saerl_fast.sae.capture import (
    Capture,
    FeatureCapture,
    _warn_once,
    check_layer,
    check_width,
    iter_hidden_ids,
    resolve_layer,
)
from saerl_fast.sae.model import SAE, SAESpec
from saerl_fast.sae.pooled import pooled_features
from saerl_kernels import CSR

VOCAB = 40
MODELS = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "neox", "gpt2")


def tiny_model(kind: str, seed: int = 0) -> Any:
    import transformers as hf

    torch.manual_seed(seed)
    common = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    common |= dict(num_hidden_layers=4, max_position_embeddings=64, initializer_range=0.3)
    common |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    grouped = common | dict(num_key_value_heads=1, head_dim=8)
    config, model = {
        "llama": lambda: (hf.LlamaConfig(**grouped), hf.LlamaForCausalLM),
        "qwen2": lambda: (hf.Qwen2Config(**grouped), hf.Qwen2ForCausalLM),
        "qwen3": lambda: (hf.Qwen3Config(**grouped), hf.Qwen3ForCausalLM),
        "gemma": lambda: (hf.GemmaConfig(**grouped), hf.GemmaForCausalLM),
        "gemma2": lambda: (hf.Gemma2Config(**grouped, sliding_window=4), hf.Gemma2ForCausalLM),
        "gemma3": lambda: (
            hf.Gemma3TextConfig(**grouped, sliding_window=4, query_pre_attn_scalar=8),
            hf.Gemma3ForCausalLM,
        ),
        "neox": lambda: (hf.GPTNeoXConfig(**common), hf.GPTNeoXForCausalLM),
        "gpt2": lambda: (
            hf.GPT2Config(
                vocab_size=VOCAB, n_embd=16, n_layer=4, n_head=2, n_positions=64, initializer_range=0.3
            ),
            hf.GPT2LMHeadModel,
        ),
    }[kind]()
    return model(config).eval()


def sae_for(d_in: int, **cfg: Any) -> SAE:
    gen = torch.Generator().manual_seed(1)
    weights = torch.randn(d_in, 48, generator=gen)
    spec = SAESpec(**{"k": 5, "hook_layer": 2, **cfg})
    return SAE(weights, torch.zeros(48), weights.t().contiguous(), torch.zeros(d_in), cfg=spec)


class Tokenizer:
    """Characters as ids; enough of the interface for these functions."""

    bos_token_id = 1

    def __call__(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        head = [1] if add_special_tokens else []
        return {"input_ids": [head + [2 + ord(c) % (VOCAB - 2) for c in text] for text in texts]}


ROWS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]


def left_padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def alone(model: Any, rows: list[list[int]], layer: int) -> Tensor:
    """Each row by itself through the whole model: what any batch must reproduce."""
    out = [model(torch.tensor([row]), output_hidden_states=True).hidden_states[layer][0] for row in rows]
    return torch.cat(out).detach()


@pytest.mark.parametrize("kind", MODELS)
def test_every_layer_equals_transformers_and_stops_there(kind: str) -> None:
    model = tiny_model(kind)
    ids, mask = left_padded(ROWS)
    ran: list[int] = []
    for number, block in enumerate(decoder(model)[1]):
        block.register_forward_hook(lambda *_, n=number: ran.append(n), prepend=True)
    for layer in range(4):
        want = alone(model, ROWS, layer)
        check_layer(model, layer)  # its own forward pass, once, is not of interest below
        ran.clear()
        ((order, x, offsets),) = iter_hidden_ids(model, ROWS, layer)
        assert ran == list(range(layer))  # at layer 0 not even the first block runs
        assert order == [0, 2, 1] and offsets.tolist() == [0, 7, 11, 13] and offsets.dtype == torch.int64
        torch.testing.assert_close(torch.cat([x[:7], x[11:], x[7:11]]), want, atol=1e-5, rtol=1e-4)
    assert model(ids, attention_mask=mask).logits.shape == (3, 7, VOCAB)  # nothing was left behind


def test_last_layer_is_the_residual_stream_before_the_final_norm() -> None:
    model = tiny_model("llama")
    _, x, _ = next(iter_hidden_ids(model, ROWS[:1], 4))
    normed = model(torch.tensor([ROWS[0]]), output_hidden_states=True).hidden_states[4][0]
    torch.testing.assert_close(model.model.norm(x), normed)
    assert not torch.allclose(x, normed, atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "cache"),
    [(kind, "dynamic") for kind in MODELS] + [(kind, "static") for kind in ("llama", "gemma2", "gpt2")],
)
def test_capture_during_generate_is_the_prefill_alone(kind: str, cache: str) -> None:
    model = tiny_model(kind)
    ids, mask = left_padded(ROWS)
    settings = dict(max_new_tokens=4, do_sample=False, disable_compile=True)
    if cache == "static":
        settings["cache_implementation"] = "static"
    plain = model.generate(ids, attention_mask=mask, **settings)
    capture, calls = Capture(model, 2), 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = model.register_forward_pre_hook(count)
    with capture:
        out = model.generate(ids, attention_mask=mask, **settings)
        first, offsets = capture.take()
        again = model.generate(ids[1:], attention_mask=mask[1:], **settings)
        model.generate(ids[:1, -1:], attention_mask=mask[:1, -1:], **settings)  # a one-token prompt
        second, both = capture.take()
    handle.remove()
    assert torch.equal(out, plain) and torch.equal(again, plain[1:])
    assert calls == 12  # one prefill and three decoding steps each: no forward pass of its own
    assert offsets.tolist() == [0, 7, 9, 13] and both.tolist() == [0, 2, 6, 7]
    torch.testing.assert_close(first, alone(model, ROWS, 2), atol=1e-5, rtol=1e-4)
    want = torch.cat([alone(model, ROWS[1:], 2), alone(model, [ROWS[0][-1:]], 2)])
    torch.testing.assert_close(second, want, atol=1e-5, rtol=1e-4)
    model.generate(ids, attention_mask=mask, **settings)
    with pytest.raises(SaerlError, match="nothing was captured"):
        capture.take()


def test_capture_in_a_hand_written_loop() -> None:
    model = tiny_model("llama")
    ids, mask = left_padded(ROWS)
    with torch.no_grad(), Capture(model, 2) as capture:
        out = model(ids, attention_mask=mask, use_cache=True)
        grown = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
        model(ids[:, -1:], attention_mask=grown, past_key_values=out.past_key_values, use_cache=True)
    x, offsets = capture.take()
    assert offsets.tolist() == [0, 7, 9, 13]
    torch.testing.assert_close(x, alone(model, ROWS, 2), atol=1e-5, rtol=1e-4)
    hooks = len(decoder(model)[1][1]._forward_hooks)
    with pytest.raises(IndexError), Capture(model, 2):
        model(ids + VOCAB, attention_mask=mask)
    assert len(decoder(model)[1][1]._forward_hooks) == hooks  # removed although the forward pass failed


def test_capture_reads_nothing_back_while_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    ids, mask = left_padded(ROWS)

    def refuse(self: Tensor, *args: Any) -> Any:
        raise AssertionError("the device was asked for a value")

    with torch.no_grad(), Capture(model, 2) as capture:
        out = model(ids, attention_mask=mask, use_cache=True)
        grown = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
        body = model.model
        kwargs = dict(input_ids=ids[:, -1:], attention_mask=grown, past_key_values=out.past_key_values)
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__bool__", "__int__", "nonzero", "cpu"):
                patch.setattr(Tensor, name, refuse)
            capture._before(body, (), kwargs)
            capture._record(torch.zeros(3, 1, 16))
            capture._before(body, (), dict(input_ids=ids, attention_mask=mask))
            capture._record(torch.zeros(3, 7, 16))
    assert capture.take()[1].tolist() == [0, 7, 9, 13, 20, 22, 26]


def test_without_a_mask_the_cache_tells_prefills_from_steps() -> None:
    model, ids = tiny_model("llama"), torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.no_grad(), Capture(model, 2) as capture:
        cache = model(ids, use_cache=True).past_key_values
        for name in ("past_key_values", "cache"):  # before transformers 5.24, and since
            capture._before(model.model, (), {"input_ids": ids[:, -1:], name: cache})
            assert not capture._armed
        capture._before(model.model, (), {"input_ids": ids, "cache": None})
        assert capture._armed


def test_streaming_restores_order_and_respects_the_budget() -> None:
    model = tiny_model("qwen2")
    ids = Tokenizer()(["abc", "a longer text", "", "xy", "a longer texT", "mm"])["input_ids"]
    found: dict[int, Tensor] = {}
    progress: list[tuple[int, int]] = []
    for rows, x, offsets in iter_hidden_ids(
        model, ids, 3, batch_tokens=16, on_progress=lambda *p: progress.append(p)
    ):
        assert max(len(ids[i]) for i in rows) * len(rows) <= 16 or len(rows) == 1
        for at, row in enumerate(rows):
            found[row] = x[offsets[at] : offsets[at + 1]]
    assert progress[-1] == (6, 6)
    for i, row in enumerate(ids):
        torch.testing.assert_close(found[i], alone(model, [row], 3), atol=1e-5, rtol=1e-4)


def test_feature_capture_equals_offline_features(device: torch.device) -> None:
    model, tokenizer = tiny_model("llama").to(device), Tokenizer()
    sae = sae_for(16)
    prompts = ["abc", "hello you", "q"]
    offline, none = pooled_features(model, sae, tokenizer(prompts)["input_ids"], batch_tokens=12)
    assert none is None and offline.n_cols == 48 and offline.nnz > 10
    ids, mask = left_padded(tokenizer(prompts)["input_ids"])
    capture = FeatureCapture(model, sae)
    with capture:
        model.generate(ids.to(device), attention_mask=mask.to(device), max_new_tokens=3, do_sample=False)
    online = capture.features()
    torch.testing.assert_close(online.to_dense(), offline.to_dense(), atol=1e-4, rtol=1e-4)
    assert set(capture.timings) == {"capture", "encode"} and min(capture.timings.values()) > 0
    capture.reset_timings()
    assert max(capture.timings.values()) == 0


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_pooled_features_split_prompt_and_answer(reduce: str) -> None:
    model, tokenizer, sae = tiny_model("llama"), Tokenizer(), sae_for(16)
    prompts, answers = ["abc", "hello you", "q"], ["42", "", "a long answer"]
    heads = tokenizer(prompts)["input_ids"]
    tails = tokenizer(answers, add_special_tokens=False)["input_ids"]
    head, tail = pooled_features(model, sae, heads, tails, layer=3, reduce=reduce, batch_tokens=16)
    assert isinstance(tail, CSR)
    for i, (first, answer) in enumerate(zip(heads, tails, strict=True)):
        row = first + answer
        codes = sae.encode(alone(model, [row], 3)).to_dense(48)  # type: ignore[call-arg]
        want = getattr(codes[: len(first)], "amax" if reduce == "max" else "mean")(0)
        torch.testing.assert_close(head.to_dense()[i], want, atol=1e-4, rtol=1e-4)
        if answer:
            want = getattr(codes[len(first) :], "amax" if reduce == "max" else "mean")(0)
            torch.testing.assert_close(tail.to_dense()[i], want, atol=1e-4, rtol=1e-4)
        else:
            assert tail.to_dense()[i].abs().sum() == 0
    assert pooled_features(model, sae, [], [])[0].n_rows == 0


def test_sink_tokens_are_left_out_of_pooling() -> None:
    sae = sae_for(16, max_norm=10.0)
    x = torch.randn(4, 16)
    x[0] *= 1000
    pooled = sae.pool(x, torch.tensor([0, 4]))
    want = sae.pool(x[1:], torch.tensor([0, 3]))
    assert torch.equal(pooled.to_dense(), want.to_dense())
    sae.cfg = replace(sae.cfg, max_norm=None)
    assert sae.pool(x, torch.tensor([0, 4])).values.max() > 100


def test_bad_activations_and_settings_are_one_sentence() -> None:
    model = tiny_model("llama")
    ids, mask = left_padded(ROWS)
    with pytest.raises(SaerlError, match="width 24 but the model's hidden size is 16"):
        FeatureCapture(model, sae_for(24))
    with pytest.raises(SaerlError, match="width 24 but the model's hidden size is 16"):
        pooled_features(model, sae_for(24), [[4]])
    with pytest.raises(SaerlError, match="layer 5 does not exist in a model of 4 blocks"):
        Capture(model, 5)
    with pytest.raises(SaerlError, match="hook_mlp_out., which is not known to be a residual stream"):
        resolve_layer(model, sae_for(16, hook_layer=None, hook_name="blocks.1.hook_mlp_out"))
    assert resolve_layer(model) == 2 and resolve_layer(model, sae_for(16), 1) == 1
    with pytest.raises(SaerlError, match="prompt 1 has no tokens"):
        pooled_features(model, sae_for(16), [[4], []])
    with pytest.raises(SaerlError, match="2 prompts but 1 answers"):
        pooled_features(model, sae_for(16), [[4], [5]], [[6]])
    with pytest.raises(SaerlError, match="text 0 has 65 tokens, the model reads 64"):
        next(iter_hidden_ids(model, [[3] * 65], 2))
    with pytest.raises(SaerlError, match="unknown"):
        sae_for(16).pool(torch.randn(3, 16), torch.tensor([0, 3]), reduce="median")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(SaerlError, match="hidden states of layer 2 are not finite at 13 of 13 tokens"):
        next(iter_hidden_ids(model, ROWS, 2))
    with pytest.raises(SaerlError, match="layer 3 are not finite at 2 of 2 tokens"):
        next(iter_hidden_ids(model, [[3, 4]], 3))
    with Capture(model, 2) as capture:
        model(ids, attention_mask=mask)
    with pytest.raises(SaerlError, match="layer 2 are not finite"):
        capture.take()


def test_layers_and_models_that_the_sae_does_not_name_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    _warn_once.cache_clear()
    model = tiny_model("llama")
    model.config._name_or_path = "someone/tiny-7"
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert resolve_layer(model, sae_for(16, hook_layer=None)) == 2
        assert len(caplog.messages) == 1 and "reads the middle one, 2; sae.layer" in caplog.text
        caplog.clear()
        assert resolve_layer(model, sae_for(16), 3) == 3
        assert len(caplog.messages) == 1 and "sae.layer=3, but the SAE was trained on layer 2" in caplog.text
        caplog.clear()
        check_width(model, sae_for(16, model_name="someone/tiny-8"))
        assert len(caplog.messages) == 1 and "someone/tiny-8 but the model is someone/tiny-7" in caplog.text
        caplog.clear()
        for name in (None, "tiny-7", "other/Tiny-7", "/models/tiny-7", "/models/tiny-7/weights.gguf"):
            check_width(model, sae_for(16, model_name=name))
        assert resolve_layer(model, sae_for(16)) == resolve_layer(model, sae_for(16), 2) == 2
        assert resolve_layer(model) == 2 and not caplog.messages


def test_encoding_beside_the_decoding_gives_the_same_features() -> None:
    """What a GPU does with a thread and a stream, here with the thread alone."""
    from concurrent.futures import ThreadPoolExecutor

    model = tiny_model("llama")
    ids, mask = left_padded(ROWS)
    settings = dict(max_new_tokens=3, do_sample=False, disable_compile=True)
    fc = FeatureCapture(model, sae_for(16))
    with fc:
        model.generate(ids, attention_mask=mask, **settings)
    want = fc.features()
    fc._worker = ThreadPoolExecutor(1)
    for _ in range(2):
        with fc:  # of a first batch that nobody asks for, as after running out of memory
            model.generate(ids[:1], attention_mask=mask[:1], **settings)
        with fc:
            model.generate(ids, attention_mask=mask, **settings)
        found = fc.features()
        assert torch.equal(found.to_dense(), want.to_dense())
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with fc:
        model.generate(ids, attention_mask=mask, **settings)
    with pytest.raises(SaerlError, match="not finite"):
        fc.features()
    with fc:
        pass
    with pytest.raises(SaerlError, match="nothing was captured"):
        fc.features()
    fc._worker.shutdown()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_side_stream_on_a_gpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(kind).cuda()
    ids, mask = (part.cuda() for part in left_padded(ROWS))
    fc = FeatureCapture(model, sae_for(16).cuda())
    fc.warm_up()
    order, x, offsets = next(iter_hidden_ids(model, ROWS, 2))
    want = fc.sae.pool(x, offsets).to("cpu").to_dense()[torch.tensor(order).argsort()]
    assert want.any()
    for _ in range(20):  # memory of the prefill is used again at once by what follows it
        with torch.no_grad(), fc:
            model(ids, attention_mask=mask, use_cache=True)
        for _ in range(20):
            torch.randn(ids.numel() * 16, device="cuda")
        torch.testing.assert_close(fc.features().to_dense(), want, atol=1e-4, rtol=1e-4)
