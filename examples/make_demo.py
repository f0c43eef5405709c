"""Make the demo's assets: a tiny language model, its tokenizer, a prompt pool and held-out items.

    python examples/make_demo.py --out examples/demo        # 4 to 9 minutes on one CPU core

Writes OUT/model/ (a 0.7 M parameter LlamaForCausalLM in bfloat16 with a 512-entry byte-level BPE
tokenizer, ordinary transformers files), OUT/pool.jsonl (2,000 prompts, 28 % of them bad: the column
`kind` says which, and the pipeline never reads it), OUT/hard.jsonl (the same with more problems beyond the
model), OUT/eval.jsonl (240 clean items; no problem is in both, not even in other words, while pretraining
draws on all of them) and OUT/sae/, which `saerl sae train --config examples/demo.yaml` makes.

The model is pretrained from nothing on the kinds of text the pool is drawn from, briefly: first on right
answers, then with a large share of near misses. It ends up knowing the formats, solving some levels,
hesitating on others, and so leaves RL something to do, as a language model trained on the web does.
The .jsonl files are the same for a seed everywhere; the weights are, on one machine and version of
torch and with one thread count.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_pool import LEVELS, TASKS, make_eval, make_pool, pretraining_text

TEMPLATE = "{prompt}\nA:"  # also data.template in demo.yaml
VOCAB_SIZE = 512
HARD = 0.75  # of hard.jsonl's problems, the share beyond the model; pool.jsonl's is make_pool's own
CLEAN = 0.8  # the share of pretraining that sees right answers only ...
NOISE = 0.45  # ... and the share of wrong answers in the rest


def make_tokenizer(seed: int, rows: int = 20_000):
    """A byte-level BPE in which digits, capitals and punctuation are single tokens.

    So arithmetic and spelling see characters, ordinary words stay short, and broken bytes cannot fail.
    An answer's tokens do not depend on the prompt before it, as the template ends in punctuation.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(seed + 2)
    corpus = [TEMPLATE.format(prompt=text) + answer for text, answer in _texts(rng, rows)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[0-9]|[A-Z](?![a-z])|[^\w\s]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=128,
    )


def make_model(tokenizer, seed: int):
    """A four-block Llama of width 128 with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer, prompt: str, answer: str) -> tuple[list[int], int]:
    """Token ids of templated prompt + answer + eos, and the number of them that are the prompt's."""
    head = tokenizer(TEMPLATE.format(prompt=prompt))["input_ids"]
    tail = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return head + tail + [tokenizer.eos_token_id], len(head)


def collate(rows: list[tuple[list[int], int]], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded ids [b, t], attention mask [b, t] and bool mask [b, t] of the answer's tokens."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    answer = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (tokens, head) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
        answer[i, head : len(tokens)] = True
    return ids, mask, answer


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    It needs fewer steps than AdamW here. torch.optim.Muon works in bfloat16, slow on most CPUs; this one
    stays in float32 and treats all matrices of a shape at once.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, rounds: int = 5) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "rounds": rounds})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                grads = torch.stack([p.grad for p in params])
                velocity = self.state[params[0]].setdefault("velocity", torch.zeros_like(grads))
                velocity.lerp_(grads, 1 - group["momentum"])
                update = orthogonal(grads.lerp(velocity, group["momentum"]), group["rounds"])
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for p, change in zip(params, update, strict=True):
                    p.sub_(change, alpha=scale)


def orthogonal(matrices: torch.Tensor, rounds: int) -> torch.Tensor:
    """Approximately U V^T of each matrix [b, m, n] = U S V^T, by a quintic Newton-Schulz iteration."""
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


def pretrain(
    model, tokenizer, held_out, *, steps: int, batch: int, lr: float, noise: float, seed: int
) -> None:
    """Muon for the blocks' matrices, AdamW for the rest; linear decay over the last two thirds.

    Every token is predicted: the answer's count in full, the prompt's a quarter. The answers are right
    until the share CLEAN of the steps, then wrong with probability ``noise``.
    """
    rng = random.Random(seed + 3)
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    optimizers = [Muon(matrices, lr=10 * lr), torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98))]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(opt, lambda s: min(1.0, (s + 1) / 50, 1.5 * (1 - s / steps)))
        for opt in optimizers
    ]
    start, running = time.perf_counter(), 0.0
    pending: list[list[tuple[list[int], int]]] = []
    model.train()
    for step in range(steps):
        if not pending:  # batches of similar length, in random order
            share = noise if step >= CLEAN * steps else 0.0
            rows = [encode(tokenizer, *text) for text in _texts(rng, 16 * batch, share)]
            rows.sort(key=lambda row: len(row[0]))
            pending = [rows[i : i + batch] for i in range(0, len(rows), batch)]
            rng.shuffle(pending)
        ids, mask, answer = collate(pending.pop(), tokenizer.pad_token_id)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weight = torch.where(answer, 1.0, 0.25) * mask
        weight = weight[:, 1:].flatten()
        loss = (loss * weight).sum() / weight.sum()
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - start
            rate = pass_rates(model, tokenizer, held_out).mean()
            print(
                f"step {step + 1}/{steps}  loss {running:.3f}  pass rate {rate:.3f}  {seconds:.0f} s",
                flush=True,
            )
    model.eval()


@torch.no_grad()
def pass_rates(model, tokenizer, rows: list[dict], batch: int = 256) -> torch.Tensor:
    """Probability [n] that one sample at temperature 1 is exactly the answer (teacher-forced)."""
    found = []
    for i in range(0, len(rows), batch):
        part = [encode(tokenizer, row["prompt"], row["answer"]) for row in rows[i : i + batch]]
        ids, mask, answer = collate(part, tokenizer.pad_token_id)
        logp = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
        token = logp.gather(-1, ids[:, 1:, None]).squeeze(-1)
        found.append((token * answer[:, 1:]).sum(-1).exp())
    return torch.cat(found)


def print_table(rows: list[dict], rates: torch.Tensor) -> None:
    """Mean pass rate of each family and level."""
    print(f"{'pass rate at T=1':16}" + "".join(f"  level {level}" for level in LEVELS))
    for task in TASKS:
        cells = []
        for level in LEVELS:
            chosen = [i for i, row in enumerate(rows) if (row["task"], row["level"]) == (task, level)]
            cells.append(f"{rates[chosen].mean():9.2f}")
        print(f"{task:16}" + "".join(cells))
    print(f"{'all':16}{rates.mean():9.3f}")


def _texts(rng: random.Random, count: int, noise: float = NOISE) -> list[tuple[str, str]]:
    return [pretraining_text(rng, noise) for _ in range(count)]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make_sae(out: Path, steps: int) -> None:
    """OUT/sae, without a manifest, which would name this machine's folders."""
    from saerl_fast import Echo, load_config, load_sae, save_sae
    from saerl_fast.stages.pipeline import sae_stage

    with tempfile.TemporaryDirectory() as folder:
        places = [f"model.path={out / 'model'}", f"data.train={out / 'pool.jsonl'}", f"run_dir={folder}"]
        config = Path(__file__).with_name("demo.yaml")
        sae_stage(
            load_config(config, [*places, f"data.eval={out / 'eval.jsonl'}", f"sae.steps={steps}"]), Echo()
        )
        save_sae(load_sae(Path(folder) / "sae"), out / "sae")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "demo")
    parser.add_argument("--steps", type=int, default=1600, help="pretraining steps")
    parser.add_argument("--batch", type=int, default=64, help="rows in a pretraining step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument(
        "--noise", type=float, default=NOISE, help="share of wrong answers late in pretraining"
    )
    parser.add_argument("--sae-steps", type=int, default=400, help="steps of the SAE, by default demo.yaml's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    args.out.mkdir(parents=True, exist_ok=True)
    held_out = make_eval(args.seed)
    write_jsonl(args.out / "pool.jsonl", make_pool(args.seed))
    write_jsonl(args.out / "hard.jsonl", make_pool(args.seed, hard=HARD))
    write_jsonl(args.out / "eval.jsonl", held_out)
    tokenizer = make_tokenizer(args.seed)
    model = make_model(tokenizer, args.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    pretrain(
        model,
        tokenizer,
        held_out,
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        noise=args.noise,
        seed=args.seed,
    )
    model.to(torch.bfloat16).save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    make_sae(args.out, args.sae_steps)
    print_table(held_out, pass_rates(model.float(), tokenizer, held_out))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
