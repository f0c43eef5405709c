from __future__ import annotations

import builtins
import gc
import logging
import os
import resource
import signal
import sys
import warnings

import numpy as np
import pytest
import torch

from saerl_fast.errors import SaerlError
from saerl_fast.rl.rewards import score_rewards
from saerl_fast.rl.rewards.contain import _umask, contained


def test_what_a_reward_sets_is_put_back(tmp_path):
    def state():
        return [
            *(torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()),
            *(torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()),
            *(torch.get_default_device(), torch.is_anomaly_enabled(), torch.get_rng_state().tolist()),
            *(sys.getrecursionlimit(), gc.isenabled(), logging.root.manager.disable, os.getcwd()),
            *(sys.stdout, sys.stderr, warnings.filters[:3], np.geterr()),
            *(signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
            *(signal.getitimer(signal.ITIMER_REAL)[0], signal.pthread_sigmask(signal.SIG_BLOCK, [])),
            *(resource.getrlimit(resource.RLIMIT_NOFILE), _umask()),
        ]

    before, folder = state(), tmp_path / "gone"
    folder.mkdir()
    with contained():
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_float32_matmul_precision("medium")
        torch.set_default_device("meta")
        torch.autograd.set_detect_anomaly(True)
        torch.manual_seed(5)
        sys.setrecursionlimit(5000)
        gc.disable()
        logging.disable(logging.CRITICAL)
        os.chdir(folder)
        folder.rmdir()
        sys.stdout.write("still heard\n")
        sys.stdout.close()
        sys.stderr = None
        warnings.simplefilter("error")
        np.seterr(all="raise")
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.alarm(100)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        resource.setrlimit(resource.RLIMIT_NOFILE, (4, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        os.umask(0o777)
    assert state() == before and not sys.stdout.closed
    sys.stdout.write("and so is this\n")


def test_it_is_put_back_after_an_error_too():
    try:
        with contained():
            torch.set_grad_enabled(False)
            raise KeyError
    except KeyError:
        pass
    assert torch.is_grad_enabled()


def test_a_fork_that_is_left_running_ends():
    with contained():
        child = os.fork()
    assert child > 0 and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_modules_and_builtins_and_environment_are_put_back(monkeypatch):
    def reward(completions, **columns):
        sys.modules.clear()
        del os.environ["KEPT"]
        for name in ("next", "isinstance", "getattr", "__import__"):
            delattr(builtins, name)
        builtins.len = None
        return [1.0]

    def late(completions, **columns):
        yield 0.5
        reward(completions)

    monkeypatch.setenv("KEPT", "here")
    before = sys.modules.copy(), vars(builtins).copy(), dict(os.environ)
    assert score_rewards(reward, ["?"], ["7"], {}).tolist() == [1.0]
    assert (sys.modules, vars(builtins), dict(os.environ)) == before
    with pytest.raises(SaerlError, match="reward late raised TypeError: 'NoneType'"):
        score_rewards(late, ["?"], ["7"], {})
    assert (sys.modules, vars(builtins), dict(os.environ)) == before
