"""Whether one model's features predict what another finds hard: models of two families on the demo's pool.

    python -m benchmarks.transfer --models examples/demo/model OTHER

Of each model: an SAE of its middle layer, trained on the pool's prompts, pooled SAE features and hidden
states of every prompt, and as pass rate its probability of the reference answer. Then Spearman with one
model's failure rates, on prompts that were never labelled, of the ridge on its own features and on the
other's; mean and standard deviation over draws of the labelled prompts.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bench_signals import figures
from benchmarks.harness import DEVICE, environment
from saerl_fast.config import SAEConfig, load_config
from saerl_fast.fileio import write_json
from saerl_fast.models.layout import n_blocks
from saerl_fast.sae.capture import resolve_products
from saerl_fast.sae.pooled import bank_pass
from saerl_fast.sae.train import collect_activations, train_sae
from saerl_fast.session import Session
from saerl_fast.signals import ridge
from saerl_fast.signals.bank import Bank, spearman

COUNTS = (64, 128, 256)
SETS = {
    "sae": ("sae",),
    "hidden": ("hidden",),
    "default": ("length", "text", "tfidf", "answer_text", "sae", "hidden"),
}


def measure(path: str, tokens: int) -> tuple[Bank, np.ndarray]:
    """The bank of the demo's pool by the model ``path``, and the model's failure rates."""
    config = load_config("examples/demo.yaml", [f"model.path={path}", "data.chat=never"])
    session = Session.open(config)
    prompts, layer = session.train, n_blocks(session.model) // 2
    acts = collect_activations(session.model, prompts.ids, layer, tokens)
    cfg = dataclasses.replace(config.sae, layer=layer)
    sae, _ = train_sae(acts, cfg, model_name=path, device=session.model.device)
    found = bank_pass(
        session.model,
        sae,
        prompts.ids,
        prompts.answer_ids,
        kinds=("sae", "hidden", "answer_logprob"),
        reduce="mean",
        dtype=resolve_products("auto", session.model),
    )
    failed = 1.0 - np.exp(found.pop("answer_logprob")[:, 0].astype(float))
    answers = prompts.column("answer")
    return Bank(found.pop("sae"), prompts.column("prompt"), found, answers), failed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs=2, required=True)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=SAEConfig.max_tokens)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    names = [Path(path).name if path.endswith(".gguf") else path for path in args.models]
    made = dict(zip(names, (measure(path, args.tokens) for path in args.models), strict=True))
    table: dict[str, Any] = {}
    for judged, (bank, failed) in made.items():
        tested, pool = np.split(np.random.default_rng(0).permutation(bank.n_rows), [bank.n_rows // 3])
        for name, (other, _) in made.items():
            for kind, kinds in SETS.items():
                blocks, row = other.blocks(kinds, np.arange(bank.n_rows)), {}
                for count in COUNTS:
                    scores = []
                    for draw in range(args.draws):
                        seen = np.random.default_rng(draw).choice(pool, count, replace=False)
                        fit = ridge.fit(blocks, seen, failed[seen])
                        scores.append(spearman(fit.predict(blocks, tested), failed[tested]))
                    row[str(count)] = figures(scores)
                table.setdefault(f"failures of {judged}", {})[f"{kind} of {name}"] = row
                print(judged, name, kind, row, flush=True)
    rates = [failed for _, failed in made.values()]
    result = {"models": names, "prompts": len(rates[0]), "agreement": spearman(*rates), "spearman": table}
    if args.out:
        write_json(args.out, result | {"draws": args.draws, "environment": environment(DEVICE)})


if __name__ == "__main__":
    main()
