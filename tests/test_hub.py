"""A hub that cannot be reached is asked once; its libraries then look into their caches, in that block."""

import os
import socket
import threading
import time

import pytest

from saerl_fast import hub
from saerl_fast.config import Config, ModelConfig
from saerl_fast.errors import SaerlError
from saerl_fast.models.load import load_model
from saerl_fast.session import load_pools


@pytest.fixture
def online(monkeypatch):
    """As a user's shell is: nothing about being offline, no proxy; connections are counted and fail."""
    for name in list(os.environ):
        if name.upper().startswith(("HF_", "TRANSFORMERS_OFFLINE")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    asked = []

    def refuse(address, timeout=None):
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    return asked


def test_offline_is_set_for_the_block_alone(online):
    import datasets.config
    from huggingface_hub import constants

    with hub.hub_access() as reached:
        assert not reached and os.environ["HF_HUB_OFFLINE"] == "1"
        assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    assert "HF_HUB_OFFLINE" not in os.environ
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE
    assert online == [("huggingface.co", 443)]


def test_nothing_is_asked_where_nothing_is_needed(online, monkeypatch):
    with hub.hub_access(False) as reached:
        assert reached
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with hub.hub_access() as reached:
        assert not reached
    assert online == []


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({"HF_ENDPOINT": "http://mirror.local:8080"}, ("mirror.local", 8080)),
        ({"HF_ENDPOINT": "http://mirror.local"}, ("mirror.local", 80)),
        ({"https_proxy": "http://proxy.local:3128"}, ("proxy.local", 3128)),
        ({"https_proxy": "proxy.local:3128"}, ("proxy.local", 3128)),
        ({"https_proxy": "http://proxy.local:3128", "no_proxy": "huggingface.co"}, ("huggingface.co", 443)),
    ],
)
def test_what_is_asked(online, monkeypatch, environment, asked):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert not hub.reachable()
    assert online == [asked]


def test_a_name_server_that_hangs_is_not_waited_for(online, monkeypatch):
    release = threading.Event()

    def hang(*_, **__):
        release.wait(30)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", hang)
    began = time.monotonic()
    assert not hub.reachable(wait=0.05)
    release.set()
    assert time.monotonic() - began < 20


def test_a_hub_that_answers_is_used(online, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: socket.socket())
    with hub.hub_access() as reached:
        assert reached and "HF_HUB_OFFLINE" not in os.environ


def test_models_and_data_sets_fail_at_once(online, monkeypatch):
    """The client's own retries would sleep for most of a minute."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(SaerlError, match="it cannot be reached from here, and its cache does not hold"):
        load_model(ModelConfig(path="no-such-org/no-such-model", device="cpu"))
    config = Config()
    config.data.train = "no-such-org/no-such-data"
    with pytest.raises(SaerlError, match="no-such-org/no-such-data"):
        load_pools(config)
    assert sum(slept) < 1
