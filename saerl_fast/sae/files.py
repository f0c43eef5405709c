"""SAEs in from wherever people have them, SAELens folders out.

`load_sae` takes a folder or a file (`formats`), or what SAELens takes: a release with an id, or a repository
of the hub (`hub`). All of them become one configuration in SAELens' terms (`saelens`), in which whatever
would not be followed exactly is refused by its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saerl_fast.errors import SaerlError, named
from saerl_fast.fileio import read_tensors
from saerl_fast.hub import at_home
from saerl_fast.records import manifest
from saerl_fast.records.lock import lock, vacant
from saerl_fast.sae import formats, hub, saelens
from saerl_fast.sae.formats import SAELENS_WEIGHTS
from saerl_fast.sae.model import SAE
from saerl_fast.sae.saelens import layer_of_hook

if TYPE_CHECKING:
    import torch

_SAELENS_VERSION = "6.54.12"  # whose configuration layout save_sae writes
USAGE = "sparsity.safetensors"  # SAELens' name
_SAID = {  # what a user may say about a checkpoint that does not say it, and how it is written
    "architecture": str,
    "k": float,
    "apply_b_dec_to_input": bool,
    "rescale_acts_by_decoder_norm": bool,
    "normalize_activations": str,
    "hook_name": str,
    "model_name": str,
}


def check_source(source: str | Path) -> None:
    """SaerlError where ``source`` is neither a path that exists nor the form of a name."""
    if not at_home(source).exists():
        hub.find(str(source))


def load_sae(source: str | Path, said: dict[str, Any] | None = None) -> SAE:
    """The SAE in a folder or a file, of a SAELens release ("release/id") or of a hub repository.

    ``said``: settings that its files leave open (`convert_sae`). float32 on the CPU. Raises SaerlError on a
    missing or incomplete checkpoint, one of `save_sae` whose files have changed, wrong shapes, pickles of
    anything but tensors, and on architectures, settings or tensors whose encoding would not be reproduced
    exactly.
    """
    path = at_home(source)
    where = f"SAE {path if path.exists() else source}"
    try:
        return _load(source, path, where, said or {})
    except SaerlError:
        raise
    except Exception as err:  # values of another type than a layout has can stumble anywhere
        why = named(err)
        raise SaerlError(f"{where} is not understood ({why}); copy its files again, or correct them") from err


def _load(source: str | Path, path: Path, where: str, said: dict[str, Any]) -> SAE:
    if path.exists():
        manifest.check(path, "sae", "saerl sae train` or `saerl sae convert")
        config, weights, scale = formats.read(path)
    else:
        config, weights, scale = hub.read(str(source))
    for name, value in said.items():
        if name in ("hook_name", "model_name"):
            config["metadata"] = dict(config.get("metadata") or {}) | {name: value}
        config = config | {name: value}
    unsaid = [name for name in ("architecture", "apply_b_dec_to_input") if config.get(name, "") is None]
    if unsaid:
        raise SaerlError(
            f"{where} does not say how it encodes ({', '.join(unsaid)}); say so once: `saerl sae convert "
            f"{source} DEST architecture=topk k=32 apply_b_dec_to_input=true "
            "hook_name=blocks.12.hook_resid_post`, for example"
        )
    sae = saelens.build(where, config, weights, scale=scale)
    if (path / USAGE).is_file():
        usage = read_tensors(path / USAGE, "copy it again, or remove it")[0]
        sae.usage = {name: part for name, part in usage.items() if part.shape == (sae.d_sae,)}
    return sae


def convert_sae(source: str | Path, folder: str | Path, said: list[str] | tuple[str, ...] = ()) -> SAE:
    """Write any SAE that `load_sae` reads as a SAELens folder, and return it.

    ``said``: ``name=value`` items for what its files leave open, such as ``k=50`` or
    ``hook_name=blocks.12.hook_resid_post``; they win over the files. A folder that holds just this already,
    since a conversion was interrupted at its end, say, stays. SaerlError on an unknown name, a wrong value,
    and a folder that holds more than what a killed conversion has left.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise SaerlError(f"{folder} is a file; name a new folder")
    with lock(folder):
        begun = manifest.look(folder, "sae")  # by a conversion that was killed
        names = begun.entry["files"] if begun.entry else ()
        made = (begun.entry or {}).get("inputs", {}).get("converted") if not begun.fault else None
        if not vacant(folder, names if begun.partial or made else ()):
            raise SaerlError(f"{folder} exists and is not empty; name a new folder, or remove it")
        sae = load_sae(source, dict(_parsed(item) for item in said))
        converted = _digest(sae)
        if made == converted:
            return sae
        if made:
            raise SaerlError(f"{folder} holds another SAE, converted before; name a new folder")
        try:
            save_sae(sae, folder, made={"inputs": {"source": str(source), "converted": converted}})
        except BaseException:  # the same command again would refuse what it has left
            entry = manifest.look(folder, "sae").entry
            for name in (*(entry["files"] if entry else ()), manifest.FILE):
                (folder / name).unlink(missing_ok=True)
            raise
    return sae


def _parsed(item: str) -> tuple[str, Any]:
    name, _, text = item.partition("=")
    if name not in _SAID:
        raise SaerlError(f"{item!r} is nothing to say about an SAE; use {', '.join(_SAID)}")
    kind = _SAID[name]
    try:
        value: Any = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        wanted = "true or false" if kind is bool else "a number"
        raise SaerlError(f"{name}={text!r} must be {wanted}") from None
    return name, int(value) if kind is float and value.is_integer() else value


def save_sae(
    sae: SAE,
    folder: str | Path,
    *,
    train: Mapping[str, Any] | None = None,
    made: Mapping[str, Any] | None = None,
) -> Path:
    """Write a folder that SAELens' ``SAE.load_from_disk`` loads with equal encodings, and return it.

    BatchTopK is written as the JumpReLU SAE it is at inference, as SAELens itself does; so is a gated SAE.
    ``train``: figures of its training, for train.json. ``made``: what a ``manifest.json`` is to say of the
    SAE beside the hashes of its files; without it there is none, and the files may be edited.
    """
    from safetensors.torch import save_file

    config, weights = _layout(sae)
    texts = {"cfg.json": config} | ({} if train is None else {"train.json": train})
    shown = {name: json.dumps(value, indent=1, allow_nan=False) + "\n" for name, value in texts.items()}
    with manifest.publish(folder, "sae", made) as new:
        save_file(weights, new(SAELENS_WEIGHTS))
        if sae.usage:
            save_file({name: part.cpu().contiguous() for name, part in sae.usage.items()}, new(USAGE))
        for name, text in shown.items():
            new(name).write_text(text)
    return Path(folder)


def _layout(sae: SAE) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """SAELens' configuration and weights."""
    architecture = "jumprelu" if sae.threshold is not None else sae.architecture
    weights = {name: getattr(sae, name).detach() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if architecture == "jumprelu":
        assert sae.threshold is not None
        weights["threshold"] = sae.threshold.detach()
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.cfg.apply_b_dec_to_input,
        "normalize_activations": sae.cfg.normalize_activations,
        "reshape_activations": "none",
        "metadata": _metadata(sae),
    }
    if architecture == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": sae.cfg.rescale_acts_by_decoder_norm}
    return config, {name: w.float().cpu().contiguous() for name, w in weights.items()}


def _digest(sae: SAE) -> str:
    """SHA-256 of all that `save_sae` writes of it, whatever the order of a file's tensors."""
    config, weights = _layout(sae)
    parts = weights | {f"usage/{name}": part.cpu().contiguous() for name, part in (sae.usage or {}).items()}
    hashes = {name: sha256(part.numpy().tobytes()).hexdigest() for name, part in parts.items()}
    return manifest.json_digest([config, hashes])


def hook_name(sae: SAE) -> str | None:
    """The hook point it reads, as TransformerLens names it; None if unknown."""
    layer = sae.layer
    if sae.cfg.hook_name is not None or layer is None:
        return sae.cfg.hook_name
    return f"blocks.{layer - 1}.hook_resid_post" if layer else "blocks.0.hook_resid_pre"


def _metadata(sae: SAE) -> dict[str, Any]:
    layer, hook = sae.layer, hook_name(sae)
    own = {"hook_name": hook, "model_name": sae.cfg.model_name, "saerl_max_norm": sae.cfg.max_norm}
    kept = {key: value for key, value in sae.cfg.metadata.items() if not key.startswith("sae_lens_")}
    if hook is not None and layer_of_hook(hook) != layer:
        own["saerl_hook_layer"] = layer
    return {**kept, **{k: v for k, v in own.items() if v is not None}, "sae_lens_version": _SAELENS_VERSION}
