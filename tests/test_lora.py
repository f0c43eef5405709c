"""Training adapters alone."""

import json
import sys
from pathlib import Path

import pytest
import torch

from saerl_fast.config import (
    EvalConfig,
    LoRAConfig,
    LossConfig,
    TrainConfig,
    WarmupConfig,
)
from saerl_fast.errors import SaerlError
from saerl_fast.records.log import read_metrics
from saerl_fast.rl import lora
from saerl_fast.rl import update as module
from saerl_fast.rl.checkpoint import load_latest, model_tensors
from saerl_fast.rl.lora import check_targets
from tests.families import tiny_family
from tests.tiny_lm import tiny_model
from tests.training import (
    PHASES,
    adaptive_plan,
    assert_same_run,
    dying_reward,
    run,
    same_weights,
    small,
    sums,
)


def adapted(**change) -> TrainConfig:
    return small(lora=LoRAConfig(rank=4, alpha=8.0), lr=1e-2, **change)


@pytest.mark.parametrize(("warm", "beta"), [(0, 0.0), (3, 0.1)])
def test_adapters_alone_are_trained_saved_and_resumed(tmp_path: Path, warm: int, beta: float) -> None:
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    cfg = adapted(warmup=WarmupConfig(steps=warm, batch_size=4, lr=1e-3), loss=LossConfig(beta=beta))
    straight, _, summary = run(tmp_path / "one", cfg)
    start = tiny_model()
    with pytest.raises(SaerlError, match="Die"):
        broken = tiny_model()
        run(tmp_path / "two", cfg, model=broken, reward=dying_reward(7))
    assert same_weights(broken, start)  # adapters taken out again
    resumed, _, again = run(tmp_path / "two", cfg, resume=True)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert same_weights(straight, resumed) and not same_weights(straight, start)
    assert type(straight) is type(start) and straight.state_dict().keys() == start.state_dict().keys()
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "model"), straight)
    saved = load_latest(tmp_path / "one")
    assert saved.model and all("lora_" in name for name in saved.model) and not saved.reference
    rows = [row for row in read_metrics(tmp_path / "one") if row["kind"] == "train"]
    learnt = [row for row in rows[1:] if row["groups_used"]]
    assert learnt and all((row["kl"] > 0) == (beta > 0) for row in learnt)
    assert beta == 0 or warm > 0 or rows[0]["kl"] == pytest.approx(0, abs=1e-6)

    import peft

    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "one" / "adapter").merge_and_unload()
    for a, b in zip(model_tensors(loaded).values(), model_tensors(straight).values(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_reference_of_adapters_is_the_model_without_them(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("peft")
    real, seen = module.policy_loss, []

    def watched(new, old, weight, lengths, size, cfg, ref, *more):
        seen.append((new.detach(), ref))
        return real(new, old, weight, lengths, size, cfg, ref, *more)

    monkeypatch.setattr(module, "policy_loss", watched)
    # with the penalty on and off, the first step's reference is the policy itself: adapters start at 0
    run(tmp_path, adapted(steps=2, loss=LossConfig(beta=0.1), warmup_steps=0))
    torch.testing.assert_close(seen[0][0], seen[0][1])
    assert not torch.allclose(seen[-1][0], seen[-1][1], atol=1e-4)


def test_adapters_with_gradient_checkpointing_and_capture(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    plain, _, _ = run(tmp_path / "one", adapted(steps=2))
    model = tiny_model()
    plan, capture = adaptive_plan(model, sums(10))
    run(tmp_path / "three", adapted(steps=2), model=model, plan=plan, capture=capture)
    times = [row["time"] for row in read_metrics(tmp_path / "three") if row["kind"] == "train"]
    assert times[-1].keys() == {*PHASES, "capture", "encode"}
    assert plan._original  # the features of the prefill reached the plan
    saving, _, _ = run(tmp_path / "two", adapted(steps=2, gradient_checkpointing=True))
    one, two = (read_metrics(tmp_path / name)[1] for name in ("one", "two"))
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
    assert not saving.training


def test_adapters_that_cannot_be(tmp_path: Path, monkeypatch) -> None:
    cfg = adapted()
    cfg.lora.targets = ["q_prj"]
    pytest.importorskip("peft")
    with pytest.raises(SaerlError, match="'q_prj' names no module of LlamaForCausalLM"):
        run(tmp_path / "out", cfg)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SaerlError, match=r"needs peft; run `pip install peft`"):
        run(tmp_path / "out", adapted())
    assert not (tmp_path / "out").exists()


def half(kind: str = "llama", **extra):
    """A bfloat16 model as `from_pretrained` makes it: its buffers stay float32."""
    model = tiny_model(kind, **extra)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def float32(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model


def logits(model) -> torch.Tensor:
    ids = torch.randint(3, 40, (16, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


@pytest.mark.parametrize(("kind", "saved"), [("llama", "float32"), ("gpt2", "float32"), ("llama", "model")])
def test_what_is_saved_of_a_half_precision_model_is_what_was_trained(tmp_path, kind, saved) -> None:
    """A short run's changes are below the spacing of bfloat16; float32 keeps them, and both are told."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    lora = LoRAConfig(rank=4, alpha=8.0, merge_dtype=saved)
    cfg, said = small(lora=lora, lr=1e-4, steps=2, eval=EvalConfig(every=2, mode="prob")), []
    trained, _, summary = run(tmp_path, cfg, model=half(kind), echo=said.append)
    base = float32(half(kind))
    before = logits(base)
    meant = logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval())
    effect = (meant - before).abs().mean()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")  # in the dtype it was saved in
    dtype = loaded.dtype
    lost = (logits(float32(loaded)) - meant).abs().mean()
    rounded = (logits(float32(trained)) - meant).abs().mean()
    assert effect > 0 and rounded > 0.3 * effect  # what the model's own dtype makes of it
    found = summary["merged"]
    assert found["rounded_to"] == "bfloat16" and 0 < found["change_kept"] < 0.7
    assert found["accuracy"] != summary["accuracy"] and summary["figures_of"] == "the model with adapter/"
    if saved == "float32":
        assert dtype == torch.float32 and lost < 2**-8 * effect
        assert found["saved_as"] == "float32" and "model/ is float32 and keeps all of it" in said[-1]
    else:
        assert lost == rounded and found["saved_as"] == "bfloat16" and "merge_dtype=float32" in said[-1]
    assert json.loads((tmp_path / "summary.json").read_text())["merged"] == found
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert same_weights(float32(again), trained)  # the figures beside are of this one


def test_float32_and_whole_models_are_what_was_evaluated(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    _, _, summary = run(tmp_path / "one", adapted(steps=1))
    assert "merged" not in summary and summary["figures_of"] == "the model with adapter/"
    _, _, summary = run(tmp_path / "two", small(steps=1))
    assert "merged" not in summary and summary["figures_of"] == "model/"


def test_tied_layers_are_not_adapted() -> None:
    pytest.importorskip("peft")
    for target in ("lm_head", "embed_tokens"):
        cfg = LoRAConfig(rank=2, targets=[target])
        with pytest.raises(SaerlError, match="share their weights"):
            check_targets(tiny_model(tie_word_embeddings=True), cfg)
        check_targets(tiny_model(tie_word_embeddings=False), cfg)


def test_adapters_that_would_not_be_what_is_merged_are_refused() -> None:
    """Jamba may multiply by the weight of dt_proj itself; Zamba 2 shares blocks; Mamba's kernels pass by
    out_proj; PhiMoE's router is no plain layer."""
    pytest.importorskip("peft")
    cases = [
        ("zamba2", "q_proj", "shared_transformer.self_attn.q_proj"),
        ("mamba", "out_proj", "incompatible"),
        ("phimoe", "all-linear", "with adapters there the model does not run"),
    ]
    called: list[int] = []
    jamba = tiny_family("jamba")
    for layer in [layer for name, layer in jamba.named_modules() if name.endswith("dt_proj")]:
        layer.register_forward_hook(lambda *_: called.append(1))
    jamba(torch.arange(3, 12)[None])
    if not called:  # older versions of transformers call it
        cases += [("jamba", "dt_proj", "does not call .*dt_proj or shares its weights")]
    for family, target, message in cases:
        with pytest.raises(SaerlError, match=message):
            check_targets(tiny_family(family), LoRAConfig(rank=2, targets=[target]))
    model = tiny_family("jamba")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_targets(model, LoRAConfig(rank=2, targets=["q_proj", "in_proj"]))  # tried and taken off again
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == before.keys() and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_are_one_parameter_are_merged(dtype: torch.dtype) -> None:
    pytest.importorskip("peft")
    model = lora.add_adapters(tiny_family("mixtral").to(dtype), LoRAConfig(rank=2, targets=["all-linear"]), 0)
    names = [name for name, _ in model.named_parameters() if ".experts." in name and "lora_B" in name]
    assert names  # of the fused experts
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        adapted = model(input_ids=ids, use_cache=False).logits
        assert lora.half_dtype(model) == (None if dtype == torch.float32 else dtype)
        weights, kept = lora.merged_weights(model)
        merged = lora.merge(model, None if dtype == torch.float32 else weights)
        assert weights.keys() == merged.state_dict().keys() and kept > 0.9
        off = (merged(input_ids=ids, use_cache=False).logits - adapted).float().abs().max()
    assert off < (1e-4 if dtype == torch.float32 else 0.3)


def test_tied_layers_stay_tied_in_float32(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = half(tie_word_embeddings=True)
    trained, _, _ = run(tmp_path, adapted(steps=1), model=model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert same_weights(loaded.bfloat16(), trained)
