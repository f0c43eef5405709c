"""The stages before training (`train`): SAE, scores, plan. Each writes what the next one reads.

A stage that finds its input missing makes it; one that finds it made with other settings says so and
stops, because silently mixing the two would make every figure after it wrong. Under torchrun only training
runs, and a missing SAE or missing scores are refused: made by one process, they would keep the GPUs of the
others waiting for as long as that takes.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from saerl_fast import __version__
from saerl_fast.config import Config
from saerl_fast.errors import SaerlError
from saerl_fast.fileio import read_json, write_text
from saerl_fast.hub import at_home
from saerl_fast.records import manifest
from saerl_fast.records.kept import drop
from saerl_fast.records.lock import lock
from saerl_fast.records.packed import Tokens
from saerl_fast.session import Session
from saerl_fast.stages.console import Echo
from saerl_fast.stages.fingerprint import (
    SAE_SECTIONS,
    SCORE_SECTIONS,
    fingerprint,
    made_from,
    training_seed,
)
from saerl_fast.stages.labels import difficulty_labels
from saerl_fast.stages.made import (
    is_there,
    needs_scores,
    refuse_other,
    run_sections,
    sae_weights,
    score_hashes,
    set_aside,
)
from saerl_fast.stages.preflight import (
    check_functions,
    check_sae,
    open_sae,
)

if TYPE_CHECKING:
    import numpy as np

    from saerl_fast.plan import Plan
    from saerl_fast.prompts.render import Prompts
    from saerl_fast.sae.model import SAE
    from saerl_fast.signals.bank import Bank
    from saerl_fast.signals.scores import Scores
    from saerl_fast.signals.shards import Shards


Stage = TypeVar("Stage", bound=Callable[..., Any])


def alone(stage: Stage) -> Stage:
    """The stage, holding the config's run folder (see `lock`) while it works."""

    @functools.wraps(stage)
    def held(config: Config, *args: Any, **options: Any) -> Any:
        with lock(config.run_dir):
            return stage(config, *args, **options)

    return cast(Stage, held)


# --- SAE -------------------------------------------------------------------------------------------


def open_session(config: Config, echo: Echo) -> Session:
    """The model and its prompts; an SAE that cannot be read or does not fit is refused before that."""
    for path in (config.sae.path, config.sae.init):
        if path is not None:
            check_sae(config, path)
    return Session.open(config, echo)


@alone
def sae_stage(config: Config, echo: Echo, session: Session | None = None, *, redo: bool = False) -> SAE:
    """Train a TopK SAE on the training prompts' (and answers') activations into ``<run_dir>/sae``.

    With ``redo`` one that these settings have made is kept. Until it is written, what an interruption would
    lose is kept in ``<run_dir>/sae.partial-*``.
    """
    from saerl_fast.rl.interrupt import Stopped, graceful_interrupt
    from saerl_fast.sae.capture import resolve_layer
    from saerl_fast.sae.card import model_card
    from saerl_fast.sae.files import hook_name, load_sae, save_sae
    from saerl_fast.sae.measure import ce_recovered
    from saerl_fast.sae.partial import Partial
    from saerl_fast.sae.tokens import Stream
    from saerl_fast.sae.train import collect_activations, train_sae

    if config.sae.path is not None:
        raise SaerlError(f"sae.path={config.sae.path} names an SAE already; leave it out to train one")
    folder = Path(config.run_dir) / "sae"
    if config.sae.init is not None and folder.resolve() == at_home(config.sae.init).resolve():
        raise SaerlError(f"sae.init={config.sae.init} is the folder to be written; choose another run_dir")
    if redo:
        set_aside(config, echo, scores=False)
        if is_there(config, "sae", echo):
            drop(config.run_dir, "sae")
            return load_sae(folder)
    session = session or open_session(config, echo)
    init = None if config.sae.init is None else open_sae(config.sae.init)
    layer = resolve_layer(session.model, init, config.sae.layer)
    mark = fingerprint(config, SAE_SECTIONS)
    with graceful_interrupt() as interrupted:
        made = f"{mark}-{int(config.score.include_answer)}-{__version__}"
        keep = Partial(config.run_dir, made, interrupted, Stopped)
        started = time.perf_counter()
        rows = _texts(config, session.train)
        tell = echo.bar("activations", "text")
        activations: Any
        if config.sae.stream:
            activations = Stream(session.model, rows, layer, config.sae, on_progress=tell, keep=keep)
        else:
            most, seed = config.sae.max_tokens, config.sae.seed
            activations = collect_activations(
                session.model, rows, layer, most, seed=seed, on_progress=tell, keep=keep
            )
        captured = time.perf_counter()
        bar = echo.bar("SAE", "step")
        bar(0, config.sae.steps)
        sae, metrics = train_sae(
            activations,
            replace(config.sae, layer=layer),
            on_step=lambda step, shown: bar(step, int(shown["steps"])),
            model_name=config.model.path,
            device=session.model.device,
            keep=keep,
            init=init,
        )
    trained = time.perf_counter()
    metrics |= ce_recovered(session.model, sae, _texts(config, session.eval), layer)
    record = {"layer": layer, **metrics, "seconds_capture": captured - started}
    record["seconds_ce"] = time.perf_counter() - trained
    write_text(folder / "README.md", model_card(sae, config, hook_name(sae), record))  # anyone may edit it
    save_sae(sae, folder, train=record, made=made_from(config, SAE_SECTIONS))
    keep.clear()
    _say_figures(config, echo, sae, record)
    echo(f"wrote {folder}")
    if number := interrupted():  # at the very end
        raise Stopped(number)
    return sae


def _texts(config: Config, prompts: Prompts) -> Sequence[list[int]]:
    """The token ids that an SAE reads of a pool."""
    if not config.score.include_answer:
        return prompts.ids
    joined = (prompt + answer for prompt, answer in zip(prompts.ids, prompts.answer_ids, strict=True))
    return Tokens.of(joined) if isinstance(prompts.ids, Tokens) else list(joined)


def _say_figures(config: Config, echo: Echo, sae: SAE, record: dict[str, Any]) -> None:
    echo(
        f"SAE at layer {record['layer']}: {sae.d_in} -> {sae.d_sae}, k={sae.cfg.k}, unexplained variance "
        f"{record['fvu']:.3f} on held-out tokens, {record['dead_fraction']:.1%} dead features"
    )
    if "ce_recovered" in record:
        echo(
            f"spliced into the model on held-out prompts: {record['ce_sae']:.3f} nats a token against "
            f"{record['ce']:.3f} ({record['ce_recovered']:.1%} of the loss recovered)"
        )
    if "fvu_before" in record:
        cosine, moved = record["drift_cosine"], record["drift_moved"]
        echo(
            f"from {config.sae.init}: unexplained variance {record['fvu_before']:.3f} before; decoder rows "
            f"have a mean cosine of {cosine:.3f} with its, {moved:.1%} below 0.9"
        )
    seconds = [record.get(name, 0.0) for name in ("seconds_capture", "seconds", "seconds_ce")]
    echo(
        "it took {:.0f} s to capture, {:.0f} s to train and {:.0f} s to splice, which reports count in steps "
        "of a run".format(*seconds)
    )


def find_sae(config: Config, echo: Echo, session: Session) -> SAE:
    """The SAE that the config names, the one trained for this run, or a newly trained one.

    SaerlError when it does not fit the model.
    """
    from saerl_fast.sae.capture import check_width, resolve_layer
    from saerl_fast.sae.files import load_sae

    path = Path(config.run_dir) / "sae"
    if config.sae.path is not None:
        sae = open_sae(config.sae.path)
    elif is_there(config, "sae", echo):
        refuse_other(config, scores=False)
        _tidy(config, "sae", SAE_SECTIONS)
        sae = load_sae(path)
    else:
        _refuse_together(path, "saerl sae train")
        with lock(config.run_dir):
            if is_there(config, "sae", Echo(quiet=True)):  # another process has made it meanwhile
                refuse_other(config, scores=False)
                sae = load_sae(path)
            else:
                sae = sae_stage(config, echo, session)
    check_width(session.model, sae)
    resolve_layer(session.model, sae, config.sae.layer)
    return sae.to(session.model.device)


def describe_sae(path: str) -> str:
    """What ``saerl sae info`` prints: the shape and flags of a checkpoint, and how it was trained here."""
    sae = open_sae(path)
    lines = [f"{path}: {sae}"]
    lines += [f"  {key}: {value}" for key, value in sorted(vars(sae.cfg).items()) if value is not None]
    trained = Path(path) / "train.json"
    if trained.is_file():
        record = read_json(trained, "saerl sae train")
        lines += [f"  {key}: {value}" for key, value in record.items()]
    return "\n".join(lines)


# --- scores ----------------------------------------------------------------------------------------


@alone
def score_stage(config: Config, echo: Echo, session: Session | None = None, *, redo: bool = False) -> Scores:
    """Score every training prompt; writes scores.parquet, scores.json and features.safetensors.

    With ``redo`` those that these settings have made are kept.
    """
    from saerl_fast.rl.generate import prove
    from saerl_fast.rl.rewards.dry import try_reward
    from saerl_fast.signals.labelled import label_columns
    from saerl_fast.signals.scores import Scores, score
    from saerl_fast.signals.table import arrow_type

    if redo:
        set_aside(config, echo)
        if is_there(config, "scores", echo):
            drop(config.run_dir, "features")
            return Scores.load(config.run_dir)
    refuse_other(config, scores=False)
    rolled_out = config.difficulty.label_column is None and config.difficulty.n_labels > 0
    if rolled_out:
        try_reward(config)
    session = session or open_session(config, echo)
    if rolled_out:
        prove(session.model, session.tokenizer)
    label_columns(session.train, config)  # before an SAE is trained
    for name, column in session.train.columns.items():
        arrow_type(name, column)
    sae = find_sae(config, echo, session)
    entry = made_from(config, SCORE_SECTIONS)
    entry["inputs"]["sae_weights"] = sae_weights(config)
    costs: dict[str, float] = {}

    def labels(bank: Bank | None = None) -> np.ndarray | None:
        rates, found = difficulty_labels(config, echo, session, bank)
        costs.update(found)
        return rates

    rates = labels if rolled_out and config.difficulty.choose == "spread" else labels()
    shards, bar = score_shards(config, sae), echo.bar("features", "prompt")
    scores = score(session, sae, config, pass_rates=rates, on_progress=bar, shards=shards)
    scores.metadata["difficulty_labels"] = costs
    trained = Path(config.run_dir) / "sae" / "train.json"
    if config.sae.path is None and trained.is_file():
        scores.metadata["sae"] = read_json(trained, "saerl sae train")
    folder = scores.save(config.run_dir, entry)
    shards.clear()
    echo(f"wrote {folder / 'scores.parquet'}, scores.json and features.safetensors")
    return scores


def score_shards(config: Config, sae: SAE) -> Shards:
    """Where the features of these settings and this SAE are kept until they are complete."""
    from saerl_fast.signals.shards import Shards

    weights = hashlib.sha256()
    for _, tensor in sorted(sae.state_dict().items()):
        weights.update(tensor.detach().float().cpu().contiguous().numpy())
    mark = f"{fingerprint(config, SCORE_SECTIONS)}-{weights.hexdigest()[:8]}"
    return Shards(config.run_dir, mark, config.score.shard)


def find_scores(config: Config, echo: Echo, session: Session | None = None) -> Scores:
    """The scores of this run, made now when they are missing."""
    from saerl_fast.signals.scores import Scores

    file = Path(config.run_dir) / "scores.parquet"
    if not is_there(config, "scores", echo):
        _refuse_together(file, "saerl score")
        with lock(config.run_dir):
            if not is_there(config, "scores", Echo(quiet=True)):  # another process has made them
                return score_stage(config, echo, session)
    refuse_other(config)
    _tidy(config, "features", SCORE_SECTIONS)
    return Scores.load(config.run_dir)


def _tidy(config: Config, name: str, sections: tuple[str, ...]) -> None:
    """Remove what was kept for an output that is complete: its process was killed before it could."""
    if any(Path(config.run_dir).glob(f"{name}.partial-*")):
        with suppress(SaerlError), lock(config.run_dir):
            drop(config.run_dir, name, mark=fingerprint(config, sections))


def _refuse_together(missing: Path, command: str) -> None:
    from saerl_fast.rl import distributed

    if distributed.size() > 1:
        raise SaerlError(
            f"{missing} is missing or incomplete; make it with `{command}`, in one process, before torchrun"
        )


# --- plan ----------------------------------------------------------------------------------------


def make_plan(config: Config, echo: Echo, session: Session | None = None) -> Plan:
    """The plan that the config asks for; without a filter, ``vanilla`` needs no SAE and no scores."""
    from saerl_fast.plan import build_plan
    from saerl_fast.signals.scores import Scores

    if needs_scores(config):
        scores = find_scores(config, echo, session)
    else:
        session = session or Session.open(config, echo)
        scores = Scores({"prompt_id": session.train.column("prompt_id")})
    plan = build_plan(
        scores,
        config.plan,
        batch_size=config.train.rollout.prompts_per_step,
        total_steps=max(config.train.steps, 1),  # 0: only the warm-up
        seed=training_seed(config),
        group_size=config.train.rollout.group_size,
        quality=config.quality,
    )
    kept, size = len(plan.prompt_ids), plan.batch_size
    echo(f"plan: {config.plan.schedule}, {kept} prompts kept, {len(plan.dropped)} dropped")
    if size > kept:
        echo(f"plan: train.rollout.prompts_per_step={size} is more than that; a batch repeats prompts")
    return plan


@alone
def plan_stage(config: Config, echo: Echo, *, redo: bool = False) -> Path:
    """Write ``<run_dir>/plan.json``: the order for this loop, TRL or verl."""
    check_functions(config)
    if needs_scores(config):
        if redo:
            set_aside(config, echo)
        refuse_other(config)
    path = Path(config.run_dir) / "plan.json"
    plan = make_plan(config, echo)
    entry = made_from(config, run_sections(config)) | {"seed": training_seed(config)}
    entry["inputs"] |= score_hashes(config)
    record_plan(plan, path.parent, entry)
    echo(f"wrote {path}")
    return path


def record_plan(plan: Plan, folder: Path, entry: dict[str, Any]) -> None:
    """Write plan.json into ``folder`` and record it there."""
    from saerl_fast.plan import save_plan

    manifest.forget(folder, "plan")
    file = save_plan(plan, folder / "plan.json")
    files = [part.name for part in (file, file.with_suffix(".safetensors")) if part.is_file()]
    manifest.record(folder, "plan", files, entry)
