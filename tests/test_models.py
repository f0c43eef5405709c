from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saerl_fast.config import ModelConfig
from saerl_fast.errors import SaerlError
from saerl_fast.models.checks import check_causal
from saerl_fast.models.layout import decoder, hidden_size, max_positions, n_blocks, token_ids
from saerl_fast.models.load import load_model, resolve_device

WORDS = ["<unk>", "<s>", "</s>", *"abcdefghij"]


def tiny_tokenizer(**special: str):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", **special)


def tiny_llama(vocab: int = len(WORDS), tied: bool = False):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama(tied=True).save_pretrained(tmp_path / "model")
    tiny_tokenizer(bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write_gguf(file: Path) -> None:
    """A random two-block Llama with a GPT-2 style vocabulary, as llama.cpp would store it."""
    import gguf
    import numpy as np

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<|endoftext|>", "</s>", *"abcdefgh", "ab", "cd"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.normal(0, 0.2, shape).astype(np.float32))

    add("token_embd.weight", len(tokens), 32)
    add("output_norm.weight", 32)
    for i in range(2):
        add(f"blk.{i}.attn_norm.weight", 32)
        add(f"blk.{i}.ffn_norm.weight", 32)
        add(f"blk.{i}.attn_q.weight", 32, 32)
        add(f"blk.{i}.attn_k.weight", 16, 32)
        add(f"blk.{i}.attn_v.weight", 16, 32)
        add(f"blk.{i}.attn_output.weight", 32, 32)
        add(f"blk.{i}.ffn_gate.weight", 64, 32)
        add(f"blk.{i}.ffn_up.weight", 64, 32)
        add(f"blk.{i}.ffn_down.weight", 32, 64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_folder_loads_ready_for_generation(folder: Path) -> None:
    model, tokenizer = load_model(ModelConfig(path=str(folder), device="cpu"))
    assert not model.training and model.dtype == torch.float32
    assert tokenizer.padding_side == "left" and tokenizer.pad_token == "</s>"
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.lm_head.weight is model.model.embed_tokens.weight  # still tied after loading
    batch = tokenizer(["a b c", "a"], return_tensors="pt", padding=True)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert model.generate(**batch, max_new_tokens=2, do_sample=False).shape == (2, 5)


def test_dtype_is_honoured(folder: Path) -> None:
    assert (
        load_model(ModelConfig(path=str(folder), device="cpu", dtype="bfloat16"))[0].dtype == torch.bfloat16
    )


def test_gguf_by_file_by_name_and_found_in_its_folder(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    models = [
        load_model(ModelConfig(path=str(file), device="cpu")),
        load_model(ModelConfig(path=str(tmp_path), gguf_file="tiny.gguf", device="cpu")),
        load_model(ModelConfig(path=str(tmp_path), device="cpu")),
    ]
    ids = torch.tensor([[2, 3, 4]])
    outputs = [model(ids).logits for model, _ in models]
    assert torch.isfinite(outputs[0]).all() and outputs[0].std() > 0
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert models[0][1]("ab")["input_ids"][-1] == 10  # the merge was read
    (tmp_path / "other.gguf").write_bytes(b"")
    with pytest.raises(SaerlError, match="2 GGUF files; set model.gguf_file="):
        load_model(ModelConfig(path=str(tmp_path), device="cpu"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(path=""), "model.path is empty"),
        (ModelConfig(path="/nowhere/model"), "/nowhere/model does not exist; pass an existing folder"),
        (ModelConfig(path="missing.gguf"), "missing.gguf does not exist"),
        (ModelConfig(path="no-such-org/no-such-model", device="cpu"), "could not be fetched from the hub"),
        (ModelConfig(path="x/y", device="cuda:99"), "'cuda:99' does not exist here"),
        (ModelConfig(path="x/y", device="cpu", attn="nonsense"), "model.attn=nonsense is unknown; .* eager"),
    ],
    ids=["empty", "folder", "gguf", "hub", "no-device", "attention"],
)
def test_bad_settings_are_one_sentence(config: ModelConfig, message: str) -> None:
    with pytest.raises(SaerlError, match=message) as caught:
        load_model(config)
    assert "\n" not in str(caught.value)


def test_bad_folders_are_one_sentence(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(SaerlError, match="neither config.json nor a .gguf"):
        load_model(ModelConfig(path=str(tmp_path)))
    with pytest.raises(SaerlError, match="holds no other.gguf"):
        load_model(ModelConfig(path=str(folder), gguf_file="other.gguf"))
    with pytest.raises(SaerlError, match="is not a .gguf"):
        load_model(ModelConfig(path=str(folder / "config.json")))
    (folder / "config.json").write_text('{"model_type": "nothing-known"}')
    with pytest.raises(SaerlError, match="could not be loaded") as caught:
        load_model(ModelConfig(path=str(folder), device="cpu"))
    assert "\n" not in str(caught.value)


def test_tokenizer_must_fit_the_model(tmp_path: Path) -> None:
    tiny_llama(vocab=5).save_pretrained(tmp_path)
    tiny_tokenizer(eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(SaerlError, match="ids up to 12 but the model embeds 5"):
        load_model(ModelConfig(path=str(tmp_path), device="cpu"))


def test_end_tokens_of_the_tokenizer_and_of_the_generation_config(tmp_path: Path, caplog) -> None:
    model = tiny_llama()
    model.generation_config.eos_token_id = [4, 2]
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_model(ModelConfig(path=str(tmp_path), device="cpu"))[1].pad_token_id == 4
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    tiny_tokenizer(pad_token="<s>").save_pretrained(tmp_path)
    with caplog.at_level("WARNING"):
        load_model(ModelConfig(path=str(tmp_path), device="cpu"))
    assert "has no end token: every completion runs to its limit" in caplog.text
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SaerlError, match="neither a pad nor an end token"):
        load_model(ModelConfig(path=str(tmp_path), device="cpu"))


def edited(folder: Path, drop: str = "", **settings: Any) -> None:
    """``folder`` without the weights that have ``drop`` in their names, and with other settings."""
    file, config = folder / "model.safetensors", folder / "config.json"
    if drop:
        kept = {name: tensor for name, tensor in load_file(file).items() if drop not in name}
        save_file(kept, file, metadata={"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "lm_head"}, "the weight lm_head.weight is missing; use a complete checkpoint"),
        ({"drop": "layers.1.mlp"}, r"layers.1.mlp.down_proj.weight is missing \(and 2 more are wrong\)"),
        ({"num_hidden_layers": 4}, "layers.3.input_layernorm.weight is missing"),
        ({"vocab_size": 20}, r"lm_head.weight is \(13, 16\), not \(20, 16\)"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "head of a LlamaForSequenceClassification"),
        ({"auto_map": {"AutoConfig": "x.C"}, "model_type": "own"}, "runs its own code"),
        ({"model_type": "t5"}, r"is an encoder-decoder \(t5\); use a decoder-only"),
        ({"model_type": "bart"}, r"is an encoder-decoder \(bart\)"),
        ({"model_type": "clip"}, "is a clip, of which transformers has no causal language model"),
        ({"model_type": "llava"}, "is a llava, of which transformers has no causal language model"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"is quantised \(fp8\); use a copy with plain"),
        ({"quantization_config": {"bits": 4}}, r"is quantised \(by no named method\)"),
        ({"hidden_act": "nosuch"}, r"KeyError: 'nosuch'\); check .* the values in its config.json"),
    ],
)
def test_what_is_no_whole_causal_language_model_is_refused_when_loaded(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer(bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    edited(tmp_path, **change)
    with pytest.raises(SaerlError, match=message) as caught:
        load_model(ModelConfig(path=str(tmp_path), device="cpu"))
    assert "\n" not in str(caught.value)


def test_weights_that_are_left_over_are_said(folder: Path, caplog) -> None:
    edited(folder, num_hidden_layers=2)
    with caplog.at_level("WARNING"):
        load_model(ModelConfig(path=str(folder), device="cpu"))
    assert "9 weights in its files are not used, such as model.layers.2." in caplog.text


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv", "weight.absmax", "SCB"])
def test_weights_that_others_belong_to_are_refused(folder: Path, name: str) -> None:
    file = folder / "model.safetensors"
    scale = {f"model.layers.0.mlp.up_proj.{name}": torch.ones(1)}
    save_file(load_file(file) | scale, file, metadata={"format": "pt"})
    with pytest.raises(SaerlError, match=rf"up_proj.{name}, .* the weight beside it is quantised"):
        load_model(ModelConfig(path=str(folder), device="cpu"))


@pytest.mark.parametrize(("dtype", "kind"), [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.bool, "BOOL")])
def test_weights_that_are_stored_as_integers_are_refused(folder: Path, dtype: torch.dtype, kind: str) -> None:
    file, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(file)
    mask = {"model.layers.1.mask": torch.ones(2, dtype=dtype)}  # a buffer may be
    save_file({key: w.bfloat16() for key, w in weights.items()} | mask, file, metadata={"format": "pt"})
    load_model(ModelConfig(path=str(folder), device="cpu"))
    save_file(weights | {name: weights[name].to(dtype)}, file, metadata={"format": "pt"})
    with pytest.raises(SaerlError, match=rf"hold {name} as {kind}: it is quantised.* plain weights"):
        load_model(ModelConfig(path=str(folder), device="cpu"))


def test_outputs_that_a_configuration_asks_for_are_left_off(folder: Path) -> None:
    edited(folder, return_dict=False, output_attentions=True, output_hidden_states=True)
    model, _ = load_model(ModelConfig(path=str(folder), device="cpu"))
    output = model(input_ids=torch.tensor([[3, 4]]))
    assert output.logits.shape == (1, 2, len(WORDS))
    assert output.hidden_states is None and output.attentions is None


def test_a_model_that_takes_sampled_pad_tokens_for_padding_is_refused() -> None:
    from transformers import XLMConfig, XLMWithLMHeadModel

    config = XLMConfig(vocab_size=20, emb_dim=16, n_layers=1, n_heads=2, causal=True, pad_token_id=2)
    torch.manual_seed(0)
    with pytest.raises(SaerlError, match=r"takes its pad token \(2\) for padding also where it is sampled"):
        check_causal(XLMWithLMHeadModel(config).eval(), "x")


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_model_that_reads_ahead_is_refused(tmp_path: Path, name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = AutoConfig.for_model(name, intermediate_size=32, max_position_embeddings=64, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(SaerlError, match="x is no causal language model: a token changes the predictions"):
        check_causal(model, "x")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_causal(tiny_llama().to(dtype), "x")


def test_adapters_are_no_models(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    adapter = folder.parent / "adapter"
    config = peft.LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(tiny_llama(), config).save_pretrained(adapter)
    with pytest.raises(SaerlError, match="holds an adapter; merge the adapter into its model first"):
        load_model(ModelConfig(path=str(adapter), device="cpu"))
    for file in adapter.glob("adapter*"):
        (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(SaerlError, match="has an adapter beside its weights"):
        load_model(ModelConfig(path=str(folder), device="cpu"))


def test_advice_fits_what_is_wrong(folder: Path) -> None:
    with pytest.raises(SaerlError, match="cannot be loaded with this model.attn .* set model.attn=sdpa"):
        load_model(ModelConfig(path=str(folder), device="cpu", attn="flash_attention_2"))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\n")
    with pytest.raises(SaerlError, match="model.safetensors is a Git LFS pointer, not the file itself"):
        load_model(ModelConfig(path=str(folder), device="cpu"))
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SaerlError, match="put the tokenizer's files into the folder"):
        load_model(ModelConfig(path=str(folder), device="cpu"))


def test_the_text_blocks_of_a_model_with_pictures() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text |= dict(vocab_size=20, num_key_value_heads=1, head_dim=8)
    pictures = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    pictures |= dict(image_size=28, patch_size=14)
    config = Gemma3Config(text_config=text, vision_config=pictures, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config)
    inside, layers = decoder(model)
    assert inside is model.model.language_model and layers is inside.layers


def test_longrope_reads_no_further_than_its_original_limit() -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    sizes |= dict(vocab_size=20, pad_token_id=0, max_position_embeddings=64)
    config = Phi3Config(rope_parameters=rope, original_max_position_embeddings=16, **sizes)
    assert max_positions(Phi3ForCausalLM(config)) == 16
    assert max_positions(tiny_llama()) == 64


def test_layout_helpers() -> None:
    model = tiny_llama()
    inside, layers = decoder(model)
    assert layers is model.model.layers and inside is model.model
    assert (n_blocks(model), hidden_size(model)) == (3, 16)
    with pytest.raises(SaerlError, match="Linear has no config"):
        decoder(torch.nn.Linear(2, 2))
    assert resolve_device("cpu") == torch.device("cpu")


def test_token_ids_never_doubles_the_beginning() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    assert token_ids(tokenizer, ["a b", "<s> a"]) == [[1, 3, 4], [1, 3]]
    assert token_ids(tokenizer, ["a b"], special=False) == [[3, 4]]
    assert token_ids(tokenizer, []) == []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )  # add_eos_token: nothing could follow such a prompt
    assert tokenizer("a b")["input_ids"] == [1, 3, 4, 2]
    assert token_ids(tokenizer, ["a b", "<s> a"]) == [[1, 3, 4], [1, 3]]
    undeclared = tiny_tokenizer()
    undeclared.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s> </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert undeclared.eos_token_id is None
    assert token_ids(undeclared, ["a b", "a a"]) == [[1, 3, 4], [1, 3, 3]]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3", "neox", "gpt2"])
def test_layout_is_seen_through_adapters(kind: str) -> None:
    """The blocks are those of the model inside, and captured hidden states those of the adapted model."""
    peft = pytest.importorskip("peft")
    from saerl_fast.sae.capture import Capture
    from tests.tiny_lm import tiny_model

    model = tiny_model(kind)
    inside = decoder(model)
    names = {id(block): i for i, block in enumerate(inside[1])}
    settings = peft.LoraConfig(
        r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(model, settings).eval()
    assert decoder(wrapped)[0] is inside[0] and hidden_size(wrapped) == 32
    assert [names[id(block)] for block in decoder(wrapped)[1]] == list(range(n_blocks(wrapped)))
    ids = torch.arange(3, 9)[None]
    with Capture(wrapped, 1) as capture, torch.no_grad():
        found = wrapped(input_ids=ids, output_hidden_states=True, use_cache=True)
    torch.testing.assert_close(capture.take()[0].view(1, 6, -1), found.hidden_states[1])
