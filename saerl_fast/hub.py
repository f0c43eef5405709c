"""Without a network the hub's own client tries every file again and again; one look spares that."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from saerl_fast.errors import SaerlError

WAIT = 3.0  # seconds for an answer to the name and the connection
_SWITCHES = (("huggingface_hub.constants", "HF_HUB_OFFLINE"), ("datasets.config", "HF_HUB_OFFLINE"))


def is_local(name: str | Path) -> bool:
    """Whether ``name`` is a file or folder here, so that nothing has to be fetched."""
    return at_home(name).exists()


def at_home(name: str | Path) -> Path:
    """``name`` as a path, with ~ as the home folder; SaerlError where it is that of nobody."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise SaerlError(f"{name} names the home folder of a user who has none; write the path out") from None


@contextmanager
def hub_access(needed: bool = True) -> Iterator[bool]:
    """Whether the hub can be reached; where not, its libraries look into their caches only, in this block."""
    if not needed or told_offline():
        yield not needed
        return
    reached = reachable()
    if reached:
        yield True
        return
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"  # for what is imported in the block
    set_before = {(at, name): getattr(sys.modules[at], name) for at, name in _SWITCHES if at in sys.modules}
    for at, name in set_before:
        setattr(sys.modules[at], name, True)
    try:
        yield False
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before
        for at, name in _SWITCHES:  # also of modules that were imported in the block
            if at in sys.modules:
                setattr(sys.modules[at], name, set_before.get((at, name), False))


def told_offline() -> bool:
    """Whether the environment says that the hub is not to be asked."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def reachable(wait: float = WAIT) -> bool:
    """Whether the hub, or the proxy on the way to it, accepts a connection within ``wait`` seconds."""
    import urllib.request  # it takes a quarter of the time that the command takes to start

    url = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    target = urlsplit(url)
    proxies = urllib.request.getproxies()
    if not urllib.request.proxy_bypass(target.hostname or ""):
        proxy = proxies.get(target.scheme) or proxies.get("all")
        if proxy:
            target = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = target.port or (80 if target.scheme == "http" else 443)
    found: list[bool] = []

    def connect() -> None:
        try:
            with socket.create_connection((target.hostname, port), timeout=wait):
                found.append(True)
        except OSError:
            pass

    asking = threading.Thread(target=connect, daemon=True)  # a name server may hang without any timeout
    asking.start()
    asking.join(wait)
    return bool(found)
