"""SAEs by name: SAELens' list of releases, read through SAELens' own loaders, and other hub repositories.

"gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical" or "release:id" is a release and an id of
SAELens' list (``sae_lens/pretrained_saes.yaml``), and "owner/repo/folder" a folder of a hub repository: the
list's entry for it where there is one, else read by its layout.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from saerl_fast.errors import SaerlError
from saerl_fast.sae import formats

_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:[:/](.+))?")
_TIMEOUT = 3.0  # seconds to reach the hub before only its cache is asked


def read(name: str) -> formats.Found:
    """Configuration, tensors and input factor of the SAE called ``name``; SaerlError where there is none."""
    entry, repository, inside = find(name)
    if entry is not None:
        return _by_saelens(name, *entry)
    return _by_layout(name, repository, inside)


def find(name: str) -> tuple[tuple[str, str] | None, str, str | None]:
    """Entry in SAELens' list, or repository and the place in it; SaerlError for what cannot be a name."""
    entry = _entry(name)
    match = _REPOSITORY.fullmatch(name)
    if entry is None and (match is None or name.startswith(("/", ".", "~"))):
        raise SaerlError(f"SAE {name} does not exist; {_hint(name)}")
    return entry, match[1] if match else "", match[2] if match else None


def _entry(name: str) -> tuple[str, str] | None:
    """(release, id) of SAELens' list; None when the name is none of its releases or repositories."""
    releases = _releases()
    head, _, rest = name.partition(":") if ":" in name else name.partition("/")
    if head in releases:
        return head, _known(name, head, rest)
    match = _REPOSITORY.fullmatch(name)
    if match is None:
        return None
    of_repository = [key for key, value in releases.items() if value["repo_id"] == match[1]]
    for release in of_repository:
        for sae in releases[release]["saes"]:
            if str(sae["path"]).strip("/") == (match[2] or "").strip("/"):
                return release, str(sae["id"])
    if of_repository and match[2]:
        return of_repository[0], _known(name, of_repository[0], match[2])
    if of_repository:
        example = releases[of_repository[0]]["saes"][0]["id"]
        raise SaerlError(
            f"SAE {name} is a repository of many; name one: {of_repository[0]}/{example}, for example"
        )
    return None


def _known(name: str, release: str, sae_id: str) -> str:
    ids = [str(sae["id"]) for sae in _releases()[release]["saes"]]
    if sae_id in ids:
        return sae_id
    close = difflib.get_close_matches(sae_id, ids, n=3, cutoff=0.3) or ids[:3]
    what = f"has no id {sae_id!r}" if sae_id else "holds several SAEs"
    raise SaerlError(
        f"SAE {name}: the release {release} {what}; name one of its {len(ids)}, such as "
        f"{', '.join(f'{release}/{found}' for found in close)}"
    )


@cache
def _releases() -> dict[str, dict[str, Any]]:
    """SAELens' list, read without importing SAELens, which takes seconds; empty where it is not installed."""
    found = importlib.util.find_spec("sae_lens")
    if found is None or not found.submodule_search_locations:
        return {}
    import yaml

    file = Path(found.submodule_search_locations[0]) / "pretrained_saes.yaml"
    if not file.is_file():
        return {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(file.read_text(), Loader=loader)  # noqa: S506  (both are safe loaders)


def _by_saelens(name: str, release: str, sae_id: str) -> formats.Found:
    entry = _releases()[release]
    sae = next(sae for sae in entry["saes"] if str(sae["id"]) == sae_id)
    what = f"{sae_id} of {release} ({entry['repo_id']})"
    with _hub(entry["repo_id"]) as state:
        _check_cache(name, what, state)
        try:
            from sae_lens.loading import pretrained_sae_loaders as loaders
            from sae_lens.loading import pretrained_saes_directory as directory

            loader = loaders.NAMED_PRETRAINED_SAE_LOADERS[loaders.get_conversion_loader_name(release)]
            repository, folder = directory.get_repo_id_and_folder_name(release, sae_id)
            overrides = directory.get_config_overrides(release, sae_id) | {
                "device": "cpu",
                "dtype": "float32",
            }
            config, weights, _ = loader(
                repo_id=repository,
                folder_name=folder,
                device="cpu",
                force_download=False,
                cfg_overrides=overrides,
            )
        except SaerlError:
            raise
        except Exception as err:  # hub errors of many kinds, and SAELens' own checks
            raise SaerlError(_failure(name, what, err, state)) from err
    config = {key: value for key, value in config.items() if key not in ("jump_relu_threshold", "hook_layer")}
    return config, weights, sae.get("norm_scaling_factor")


def _by_layout(name: str, repository: str, folder: str | None) -> formats.Found:
    with _hub(repository) as state:
        _check_cache(name, repository, state)
        try:
            import huggingface_hub as client

            wanted = [f"{folder}/*", f"{folder}/checkpoints/*", folder] if folder else None
            if folder is None and state == "online":
                wanted = _root_files(client.list_repo_files(repository), name)
            path = Path(client.snapshot_download(repository, allow_patterns=wanted))
        except ImportError:
            raise SaerlError(
                f"SAE {name} is no folder; for one of the hub, pip install huggingface_hub"
            ) from None
        except SaerlError:
            raise
        except Exception as err:  # the hub client raises many kinds
            raise SaerlError(_failure(name, repository, err, state)) from err
    path = path / folder if folder else path
    if not path.exists():
        raise SaerlError(f"SAE {name}: the hub repository {repository} has no {folder}")
    return formats.read(path)


def _root_files(files: list[str], name: str) -> list[str]:
    """The files to download of a repository that was named without a folder: those of its one SAE."""
    marks = [mark for marks, _ in formats.FOLDERS for mark in marks]
    root = [file for file in files if "/" not in file or file in marks]
    if any(Path(file).suffix in formats.FILES for file in root):
        return root
    inside = sorted({str(Path(file).parent) for file in files if Path(file).suffix in formats.FILES})
    if not inside:
        raise SaerlError(
            f"SAE {name}: the hub repository holds no file of an SAE ({', '.join(formats.FILES)})"
        )
    raise SaerlError(f"SAE {name} is a repository of many; name one: {name}/{inside[0]}, for example")


@contextmanager
def _hub(repository: str) -> Iterator[str]:
    """ "online"; or, where the hub cannot be reached and its client must not try, "cached" or "absent"."""
    try:
        from huggingface_hub import constants
    except ImportError:
        yield "absent"
        return
    before = constants.HF_HUB_OFFLINE
    state = "online"
    if before or not _reachable(constants.ENDPOINT):
        kept = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
        state = "cached" if kept.is_dir() else "absent"
    constants.HF_HUB_OFFLINE = state != "online"
    try:
        yield state
    finally:
        constants.HF_HUB_OFFLINE = before


def _reachable(endpoint: str) -> bool:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # the proxy decides
    host, _, port = re.sub(r"^\w+://", "", endpoint).partition("/")[0].partition(":")
    default = 80 if endpoint.startswith("http://") else 443
    try:
        socket.create_connection((host, int(port or default)), timeout=_TIMEOUT).close()
    except OSError:
        return False
    return True


def _check_cache(name: str, what: str, state: str) -> None:
    """SaerlError at once where nothing of the repository is here; importing SAELens alone takes seconds."""
    if state == "absent":
        raise SaerlError(_failure(name, what, None, state))


def _failure(name: str, what: str, err: Exception | None, state: str) -> str:
    close = difflib.get_close_matches(re.split(r"[:/]", name)[0], _releases(), n=1, cutoff=0.8)
    hint = f"; did you mean the release {close[0]}?" if close and not name.startswith(close[0]) else ""
    if state == "online":
        reason = f"{type(err).__name__}: {(str(err).strip().splitlines() or [''])[0]}"
        return f"SAE {name}: {what} could not be read ({reason}); check the name and your access to it{hint}"
    return (
        f"SAE {name} is no folder or file here, and the hub, which cannot be reached, has not left {what} "
        f"in its cache; check the path, or go online{hint}"
    )


def _hint(name: str) -> str:
    close = difflib.get_close_matches(re.split(r"[:/]", name)[0], _releases(), n=1)
    if close:
        return f"did you mean the release {close[0]}?"
    more = "" if _releases() else " (pip install sae-lens for releases)"
    return f"pass a folder, a file, a SAELens release/id or a hub repository{more}"
