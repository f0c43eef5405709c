"""Rewards with a time limit (``train.reward_timeout``).

A reward that `get_reward` has found by its name is called in a child process that imports it anew and lives
as long as the run: it is killed when the limit has passed, whatever it is doing, and started again. It has
modules of its own; only the states of Python's, NumPy's and torch's generators are lent to it, so rewards
that draw at random draw what they would here. A function object (a closure, a notebook's) may need this
process: it is called here, where a signal ends it, which C code that looks at no signals outlives.
"""

from __future__ import annotations

import functools
import logging
import os
import random
from typing import Any

import numpy as np
import torch

from saerl_fast.plugins import source_digest
from saerl_fast.rl.interrupt import TimeUp, call_within
from saerl_fast.rl.rewards.ask import Failed, Notes, Reward, Rows, ask, name_of, place
from saerl_fast.rl.worker import Died, Late, Worker

log = logging.getLogger(__name__)
Key = tuple[str, str, "str | None"]  # working folder, name, a hash of the file
_workers: dict[Key, Worker] = {}


class Limited:
    """``fn``, of which a call of more than ``seconds`` ends with Failed."""

    def __init__(self, fn: Reward, seconds: float) -> None:
        self.fn, self.seconds = fn, seconds
        functools.update_wrapper(self, fn)
        self.__name__ = name_of(fn)
        spec, named = getattr(fn, "reward_spec", ("", None))  # wraps() copies it to other functions
        self.key = (os.getcwd(), spec, source_digest(spec)) if named is fn else None
        if self.key is not None:
            _worker(self.key)  # its imports need not be waited for
        else:
            log.warning(
                "reward %s is given as an object and so called in this process, where train.reward_timeout "
                "ends neither crashes nor code that hears no signals; name it (module:function) to be safe",
                name_of(fn),
            )

    def __call__(self, **arguments: Any) -> Any:
        return self.fn(**arguments)

    def ask(self, rows: Rows, notes: Notes) -> np.ndarray:
        """As `ask`, within the limit."""
        late = functools.partial(
            Failed,
            name_of(self.fn),
            f"took more than train.reward_timeout={self.seconds:g} s",
            "mend it or raise the limit",
            at=f" for {len(rows.completions)} completions",
            search=True,
        )
        if self.key is None:
            try:
                return call_within(self.seconds, lambda: ask(self.fn, rows, notes))
            except TimeUp as err:
                raise late(place(self.fn, err)) from None
        # as an array: to pickle a tensor takes longer than all the rest
        state = random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()
        worker, call = _worker(self.key), f"{__name__}:there"
        try:
            found, noted, *state = worker.call(call, self.key, rows, state, seconds=self.seconds)
        except Late as err:
            raise late(place(self.fn, frames=err.frames)) from None
        except Died as err:
            raise Failed(name_of(self.fn), str(err), "mend it", place(self.fn), search=True) from None
        random.setstate(state[0])
        np.random.set_state(state[1])
        notes.add(noted)
        return found


def _worker(key: Key) -> Worker:
    """The child for a reward; one whose file has changed since gives way to another."""
    if key not in _workers:
        for old in [old for old in _workers if old[1] == key[1]]:
            _workers.pop(old).kill()
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        _workers[key] = Worker((f"{__name__}:found", key), threads)
    return _workers[key]


def found(folder: str, spec: str, digest: str | None) -> None:
    """In the child: import the reward."""
    os.chdir(folder)
    _reward(spec)


def there(key: Key, rows: Rows, state: tuple[Any, Any, Any]) -> tuple[np.ndarray, Notes, Any, Any]:
    """In the child: the reward's answer, what it logged, and the generators' states after it."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(torch.from_numpy(state[2]))
    notes = Notes()
    scores = ask(_reward(key[1]), rows, notes)
    return scores, notes, random.getstate(), np.random.get_state()


@functools.cache
def _reward(spec: str) -> Reward:
    from saerl_fast.rl.rewards import get_reward

    return get_reward(spec)
