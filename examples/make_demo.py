"""Make the demo's assets: a tiny language model, its tokenizer, a prompt pool and held-out items.

    python examples/make_demo.py --out examples/demo        # about TODO minutes on one CPU core

Writes OUT/model/ (a 0.9 M parameter LlamaForCausalLM in bfloat16 with a 512-entry byte-level BPE
tokenizer, ordinary transformers files), OUT/pool.jsonl (2,000 prompts, 28 % of them bad: the column
`kind` says which, and the pipeline never reads it) and OUT/eval.jsonl (240 clean items whose problems
are in neither the pool nor the pretraining text).

The model is pretrained from nothing on the kinds of text the pool is drawn from, briefly and with a
share of wrong answers, so that it knows the formats, solves some levels and leaves RL room elsewhere.
The two .jsonl files are the same for a seed everywhere; the weights are too on one machine and
thread count.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_pool import LEVELS, TASKS, make_eval, make_pool, pretraining_text

TEMPLATE = "{prompt}\nA:"  # also data.template in demo.yaml
VOCAB_SIZE = 512
NOISE = 0.3  # share of wrong answers in the pretraining text
import os

MUON = float(os.environ.get("MUON", "0"))


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
            pre_tokenizers.Split(Regex(r"[0-9A-Z]|[^\w\s]"), "isolated"),
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
        intermediate_size=384,
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


def pretrain(model, tokenizer, *, steps: int, batch: int, lr: float, noise: float, seed: int) -> None:
    """AdamW with a short warm-up and a cosine decay; every token is predicted, answers count in full,
    prompts at a quarter."""
    rng = random.Random(seed + 3)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    if MUON:
        optimizers = [
            torch.optim.Muon(matrices, lr=MUON, weight_decay=0.0),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
    else:
        optimizers = [torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda s: min(1.0, (s + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * s / steps))),
        )
        for optimizer in optimizers
    ]
    start, running = time.perf_counter(), 0.0
    pending: list[list[tuple[list[int], int]]] = []
    model.train()
    for step in range(steps):
        if not pending:  # batches of similar length, in random order
            rows = [encode(tokenizer, *text) for text in _texts(rng, 16 * batch, noise)]
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
            print(f"pretraining step {step + 1}/{steps}  loss {running:.3f}  {seconds:.0f} s", flush=True)
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "demo")
    parser.add_argument("--steps", type=int, default=2000, help="pretraining steps")
    parser.add_argument("--batch", type=int, default=128, help="rows in a pretraining step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--noise", type=float, default=NOISE, help="share of wrong answers in pretraining")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    args.out.mkdir(parents=True, exist_ok=True)
    held_out = make_eval(args.seed)
    write_jsonl(args.out / "pool.jsonl", make_pool(args.seed))
    write_jsonl(args.out / "eval.jsonl", held_out)
    tokenizer = make_tokenizer(args.seed)
    model = make_model(tokenizer, args.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    pretrain(
        model,
        tokenizer,
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        noise=args.noise,
        seed=args.seed,
    )
    model.to(torch.bfloat16).save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    print_table(held_out, pass_rates(model.float(), tokenizer, held_out))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
