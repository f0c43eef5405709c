"""Tiny random models of every family of causal language models in transformers, and what is compared.

``python -m tests.families`` tries all of them and prints a table; ``make families`` keeps it. A family is
right when sampled, trained and shared log-probabilities, their gradients and captured hidden states are
those of transformers' own plain forward pass over one row at a time, and the model that it is saved as is
the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import saerl_fast
from saerl_fast import fileio
from saerl_fast.config import RolloutConfig
from saerl_fast.errors import SaerlError

SIZES = {  # of the settings that a configuration has
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("encoder_layers", "encoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "lru_width"), 32),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "mamba_expand", "linear_num_key_heads"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim"), 16),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "attention_window_size"), 6),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "mamba_n_heads", "mamba_d_head"), 8),
    **dict.fromkeys(("mamba_num_heads", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("mamba_d_conv", "linear_num_value_heads", "chunk_size", "mamba_chunk_size"), 4),
    **dict.fromkeys(("time_step_rank", "rotary_dim"), 4),
    **{"index_topk": 6, "index_n_heads": 16, "index_head_dim": 16},  # many heads, or most scores are 0
    **{"vocab_size": 64, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8},
    **{"conv_L_cache": 3, "query_pre_attn_scalar": 8, "expert_ffn_hidden_size": 32},
    **{"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0},
}
LOOP = ("cache", "decode", "generate", "logprobs", "rollouts", "ways")
DROP = object()  # a setting that is left as it is
DECODER = {"is_decoder": True}
DELTA = ["linear_attention", "full_attention"] * 2
WINDOWED = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
WINDOWED |= {"head_dim": 16, "qk_nope_head_dim": 8, "v_head_dim": 8}
LATENT = {"num_key_value_heads": 4}  # multi-head latent attention has as many keys as queries
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), LATENT),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu", "sarvam_mla"), LATENT),
    **dict.fromkeys(("cwm", "modernbert-decoder"), {"bos_token_id": 2}),
    **dict.fromkeys(("bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie"), DECODER),
    **dict.fromkeys(("megatron-bert", "rembert", "roberta", "roformer", "xlm-roberta"), DECODER),
    **dict.fromkeys(("roberta-prelayernorm", "xlm-roberta-xl", "bert-generation"), DECODER),
    "falcon": {"head_dim": DROP, "alibi": False},
    "falcon-alibi": {"head_dim": DROP, "alibi": True},
    "falcon_h1": {"mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "zaya": {"num_experts_per_tok": 1},
    "xlstm": {"v_head_dim": DROP, "qk_head_dim": DROP},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    **dict.fromkeys(("lfm2", "lfm2_moe"), {"layer_types": ["conv", "full_attention"] * 2}),
    "lfm3": {"layer_types": ["conv", "full_attention"] * 2},
    "gemma3n_text": {"num_kv_shared_layers": 0, "num_hidden_layers": 5},
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), {"head_dim": 8, "global_head_dim": 8}),
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "bailing_hybrid": LATENT | {"layer_group_size": 2},
    "kimi_linear": LATENT | {"linear_head_dim": 8, "linear_num_heads": 4, "layer_types": DELTA},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8}
    | {"indexer_budget": 4, "indexer_compress_ratio": 1, "ngram_vocab_size_base": 64, "split_ngram_parts": 1},
    "zamba": LATENT
    | {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2}
    | {"attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 2, "mamba_dt_rank": 4},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}}
    | {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8}},
    "cpmant": {"dim_head": 8, "dim_ff": 64, "prompt_length": 2, "prompt_types": 4, "segment_types": 4},
    "xlnet": {"d_inner": 64, "max_position_embeddings": DROP},
    "prophetnet": DECODER
    | {"num_hidden_layers": DROP, "num_encoder_layers": 4, "num_decoder_layers": 4}
    | {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "encoder_ffn_dim": 64},
    "roc_bert": DECODER
    | {"pronunciation_embed_dim": 32, "pronunciation_vocab_size": 64}
    | {"shape_embed_dim": 32, "shape_vocab_size": 64},
    "reformer": DECODER
    | {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (16, 16), "attn_layers": ["local", "lsh"] * 2}
    | {"attention_head_size": 8, "feed_forward_size": 64, "num_hidden_layers": DROP},
    "xlm": {"causal": True},
    "xmod": DECODER | {"languages": ["en_XX", "de_DE"], "default_language": "en_XX"},
    "dots3_note_text": WINDOWED
    | {f"swa_{name}": size for name, size in WINDOWED.items()}
    | {"shared_experts_intermediate_size": 32, "qk_rope_head_dim": 8, "index_head_dim": 8}
    | {"sliding_window": 6, "layer_types": ["indexed_attention", "sliding_attention"] * 2},
}
FROM_FIRST_BLOCK = ("falcon_mamba", "mamba", "mamba2", "rwkv")  # whose hidden_states lack the embeddings
PARTS = (  # several media, or no decoders of text: where they have a text part, it is a family, too
    *("blt", "cohere_compass_text", "dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "git"),
    *("gemma4_unified", "got_ocr2", "llama4", "mllama", "moss_transcribe_diarize", "musicgen", "qwen3_5"),
    *("musicgen_melody", "phi4_multimodal", "qwen3_5_moe", "qwen4_exp", "gemma4_assistant", "trocr"),
    *("gemma4_unified_assistant", "whisper"),
)


def families() -> list[str]:
    """Names of all families that transformers has a causal language model of, less those of several media."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    return sorted({*known, "falcon-alibi"} - set(PARTS))


def tiny_family(name: str, *, spread: float = 4.0, **extra: Any) -> Any:
    """A random model of the family; ``spread`` scales its matrices, so that an error shows."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = CONFIG_MAPPING[name.removesuffix("-alibi")]
    default = known()
    kept = {key: value for key, value in SIZES.items() if _has(default, key)}
    kept = {key: v for key, v in kept.items() if getattr(known, "attribute_map", {}).get(key) not in kept}
    if "index_topk" in kept:  # a pad token's embedding is 0, which scores every key alike
        kept["pad_token_id"] = None
    kept |= SPECIAL.get(name, {}) | extra
    config = known(**{key: value for key, value in kept.items() if value is not DROP})
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 3_000_000:
        raise ValueError(f"{size} parameters: its settings are not those of tests/families.py")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 and parameter.std() < 0.1 and "conv" not in key:
                parameter.mul_(spread)
    return model


def _has(config: Any, key: str) -> bool:
    try:
        return hasattr(config, key)
    except Exception:  # of settings that differ by layer
        return False


def judge(model: Any) -> dict[str, Any]:
    """What the loop makes of a model: the way it decodes in, and by how much each result is off.

    Raises what the loop raises: SaerlError for a model that it refuses.
    """
    from saerl_fast.models.checks import check_causal
    from saerl_fast.models.layout import n_blocks
    from saerl_fast.rl import logprobs, ways
    from saerl_fast.rl.generate import generate
    from saerl_fast.rl.logprobs import check_gradient
    from saerl_fast.sae.capture import Capture, iter_hidden_ids
    from tests.tiny_lm import char_tokenizer

    g = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 40, (n,), generator=g).tolist() for n in (9, 3, 14, 5, 14)]
    cfg = RolloutConfig(group_size=3, max_new_tokens=8, temperature=0.7)
    layer = 2
    seen: list[Any] = []

    class Watch(Capture):
        def features(self) -> None:
            seen.append(self.take())

    report: dict[str, Any] = {}
    check_causal(model, model.config.model_type)
    check_gradient(model)
    try:
        blocks = n_blocks(model)
        inner = {0, 1, layer, blocks - 1} - {0 if model.config.model_type in FROM_FIRST_BLOCK else -1}
        report["capture"] = max(_capture(model, prompts, i, iter_hidden_ids) for i in inner)
        watch = Watch(model, layer)
    except SaerlError as error:
        report["capture"], watch = f"refused: {error}", None
    made = generate(model, char_tokenizer(), prompts, cfg, seed=3, capture=watch)
    ids, starts, lengths = made.sequences()
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = [row[: s + n] for row, s, n in zip(ids, starts.tolist(), lengths.tolist(), strict=True)]
    wanted, slopes = _truth(model, rows, starts, lengths, cfg.temperature, parameters)
    report["saved"] = _saved(model, rows[0])
    report["decoding"] = ways.decoding(model, True).way.name
    report["generate"] = float((made.logprobs[made.completion_mask] - wanted).abs().max())
    owner = torch.arange(len(ids)) // cfg.group_size
    for kind, options in (("logprobs", {}), ("shared", {"owner": owner})):
        logprobs.SHARE_BELOW, kept = 9.0, logprobs.SHARE_BELOW
        found, _ = logprobs.completion_logprobs(model, ids, starts, lengths, temperature=0.7, **options)
        logprobs.SHARE_BELOW = kept
        report[kind] = float((found.detach() - wanted).abs().max())
        report[f"{kind}_gradient"] = _distance(_slopes(found, parameters), slopes)
    if seen:
        order = [part for x, offsets in seen for part in x.split(offsets.diff().tolist())]
        equal = ways.decoding(model, True).way.equal
        texts = sorted(prompts, key=len, reverse=True) if equal else prompts
        pairs = zip(order, texts, strict=True)
        report["rollout_capture"] = max(_relative(x, _hidden(model, row, layer)) for x, row in pairs)
    return report


@torch.no_grad()
def _saved(model: Any, row: Tensor) -> float:
    """By how much the logits of the model differ from those of the one that it is saved as."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()
    pair = [m(input_ids=row[None], use_cache=False).logits for m in (model, again)]
    return float((pair[0] - pair[1]).abs().max())


def verdict(report: dict[str, Any], limit: float = 2e-3) -> str:
    """right, or WRONG and in what."""
    off = [name for name, value in report.items() if isinstance(value, float) and not value <= limit]
    return f"WRONG: {', '.join(off)}" if off else "right"


def _truth(model: Any, rows: Any, starts: Tensor, lengths: Tensor, temperature: float, of: Any) -> Any:
    """Log-probabilities [M] of the completions by one plain forward pass a row, and their gradients."""
    found = []
    for row, start in zip(rows, starts.tolist(), strict=True):
        logits = model(input_ids=row[None], use_cache=False).logits[0, start - 1 : -1].float() / temperature
        found.append(logits.log_softmax(-1).gather(1, row[start:, None])[:, 0])
    values = torch.cat(found)
    return values.detach(), _slopes(values, of)


def _slopes(values: Tensor, of: Any) -> list[Tensor | None]:
    weights = torch.randn(len(values), generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad((values * weights).sum(), of, allow_unused=True))


def _distance(ours: list[Any], theirs: list[Any]) -> float:
    """The largest difference of two lists of gradients, relative to the largest entry of all."""
    scale = max(float(b.abs().max()) for b in theirs if b is not None)
    zero = torch.zeros(1)
    pairs = ((zero if a is None else a, zero if b is None else b) for a, b in zip(ours, theirs, strict=True))
    return max(float((a - b).abs().max()) for a, b in pairs) / scale


@torch.no_grad()
def _hidden(model: Any, row: list[int], layer: int) -> Tensor:
    ids = torch.tensor([row])
    output = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    late = model.config.model_type in FROM_FIRST_BLOCK
    return output.hidden_states[layer - late][0]


def _relative(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    return float((found - wanted).abs().max() / wanted.abs().max())


def _capture(model: Any, prompts: list[list[int]], layer: int, iter_hidden_ids: Any) -> float:
    off = 0.0
    for chosen, x, offsets in iter_hidden_ids(model, prompts, layer, 60):
        for row, part in zip(chosen, x.split(offsets.diff().tolist()), strict=True):
            off = max(off, _relative(part, _hidden(model, prompts[row], layer)))
    return off


def sweep(names: list[str], keep: Callable[[dict[str, Any]], None]) -> None:
    """Hand ``keep`` a row for each family: its name, what happened, and the figures."""
    for name in names:
        row: dict[str, Any] = {"family": name}
        began = time.perf_counter()
        try:
            model = tiny_family(name)
        except Exception as error:
            row |= {"verdict": "not built", "reason": _line(error)}
        else:
            try:
                report = judge(model)
                row |= {"verdict": verdict(report)} | report
            except SaerlError as error:
                row |= {"verdict": "refused", "reason": _line(error)}
            except Exception as error:
                row |= {"verdict": "TRACEBACK", "reason": _line(error)}
        keep({k: float(f"{v:.1e}") if isinstance(v, float) else v for k, v in row.items()})
        print(_show(row), f"{time.perf_counter() - began:.1f} s", flush=True)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:240]


def _show(row: dict[str, Any]) -> str:
    parts = [f"{k}={v:.1e}" if isinstance(v, float) else str(v) for k, v in row.items()]
    return " | ".join(parts)


def made_by() -> dict[str, str]:
    """Versions, and a digest of the code that the figures are of."""
    import transformers

    own = ("load", "checks", "layout")
    files = (
        *(f"models/{name}.py" for name in own),
        "sae/capture.py",
        "sae/blocks.py",
        *(f"rl/{name}.py" for name in LOOP),
    )
    code = b"".join((Path(saerl_fast.__file__).parent / name).read_bytes() for name in files)
    digest = hashlib.sha256(code).hexdigest()[:12]
    return {"transformers": transformers.__version__, "torch": torch.__version__, "code": digest}


def main(arguments: list[str]) -> int:
    """``[--out FILE] [family ...]``; the exit code is the number of families that are wrong.

    A file made by the same code and versions is gone on with: only families that it lacks, or that are
    named, are tried.
    """
    out = Path(arguments.pop(1)) if arguments[:1] == ["--out"] else None
    named, made = arguments[1:] if out else arguments, made_by()
    rows: dict[str, dict[str, Any]] = {}
    if out is not None and out.exists():
        before = json.loads(out.read_text())
        if made.items() <= before.items():
            rows = {row["family"]: row for row in before["families"]}

    def keep(row: dict[str, Any]) -> None:
        rows[row["family"]] = row
        if out is not None:
            text = ",\n".join(json.dumps(rows[name]) for name in sorted(rows))
            head = json.dumps(made | {"counts": _counts(rows)})
            fileio.write_text(out, f'{head[:-1]}, "families": [\n{text}\n]}}\n')

    sweep(named or [name for name in families() if name not in rows], keep)
    print(counts := _counts(rows))
    return counts.get("WRONG", 0) + counts.get("TRACEBACK", 0)


def _counts(rows: dict[str, dict[str, Any]]) -> dict[str, int]:
    return dict(Counter(row["verdict"].partition(":")[0] for row in rows.values()))


def quiet() -> None:
    """Leave the terminal to the table."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("saerl_fast").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


if __name__ == "__main__":
    quiet()
    sys.exit(main(sys.argv[1:]))
