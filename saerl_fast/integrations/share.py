"""A folder of `export` on the Hugging Face hub, as a dataset that ``load_dataset`` reads.

    saerl export runs/mine exported --to trl --push-to-hub me/my-prompts --private

It is ``hf upload me/my-prompts exported --repo-type dataset``: the files with their card, in one commit,
without the manifest, which is of this folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from saerl_fast.errors import SaerlError, first_line
from saerl_fast.hub import reachable, told_offline
from saerl_fast.records import manifest


def check_share(name: str) -> None:
    """SaerlError unless ``name`` can be a repository's, and the hub knows the token of this machine."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import validate_repo_id

    what = f"--push-to-hub {name}"
    try:
        validate_repo_id(name)
    except ValueError as err:
        raise SaerlError(f"{what} is no name of a repository ({first_line(err)}); give USER/NAME") from None
    if told_offline():
        raise SaerlError(f"{what}: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it, or export alone")
    if get_token() is None:
        raise SaerlError(f"{what} needs a token that may write; run `hf auth login`, or set HF_TOKEN")
    if not reachable():
        raise SaerlError(f"{what}: the hub cannot be reached from here; export alone, and upload later")
    _asked(what, lambda: HfApi().whoami())


def share(folder: str | Path, name: str, *, private: bool = False) -> str:
    """Upload what is in ``folder`` to the dataset ``name``, which is made if it is not there; its address.

    Files of the same names are replaced there and others stay. Raises SaerlError when the hub refuses.
    """
    from huggingface_hub import HfApi

    api, what = HfApi(), f"{folder} is written, but --push-to-hub {name}"
    options: dict[str, Any] = {"repo_id": name, "repo_type": "dataset"}
    made = _asked(what, lambda: api.create_repo(**options, private=private or None, exist_ok=True))
    options["repo_id"] = made.repo_id
    message = "Prompts scored by saerl-fast"
    _asked(
        what,
        lambda: api.upload_folder(
            **options, folder_path=str(folder), ignore_patterns=[".*", manifest.FILE], commit_message=message
        ),
    )
    return str(made)


def _asked(what: str, ask: Callable[[], Any]) -> Any:
    """What the hub answers; its refusals and the network's as a SaerlError about ``what``."""
    try:
        return ask()
    except Exception as err:  # its client raises many kinds
        said = str(getattr(err, "server_message", None) or first_line(err)).strip(" .")
        code = getattr(getattr(err, "response", None), "status_code", None)
        mend = {
            401: "run `hf auth login` with a token that is valid",
            403: "take a token that may write there, or another name",
        }.get(code or 0, "mend it, or upload the folder by `hf upload`")
        raise SaerlError(f"{what} failed ({said}); {mend}") from err
