"""Math-Verify (github.com/huggingface/Math-Verify) in a child process, so that no expression can hang a run.

It stops long computations by an alarm that only the main thread may set and that big numbers never notice;
the child has a main thread of its own, a limit on its memory, and is killed when neither helps.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import cache, lru_cache
from typing import Any

from saerl_fast.rl.worker import Died, Late, Worker

SECONDS = 3  # for reading an expression, and for comparing two
MOST = 10.0  # seconds for all of it, after which the child is killed
MEMORY = 8 << 30  # bytes of addresses that the child may take


@lru_cache(maxsize=4096)
def same_expression(one: str, gold: str) -> bool:
    """Whether Math-Verify finds two LaTeX expressions equal; False where that takes too long."""
    try:
        return bool(_worker().call(f"{__name__}:compare", one, gold, seconds=MOST))
    except (Late, Died):
        return False


@cache
def _worker() -> Worker:
    return Worker((f"{__name__}:prepare", ()))


def prepare() -> None:
    """In the child: a limit on its memory, the imports, and no notices that a text takes too long."""
    logging.disable(logging.CRITICAL)
    with suppress(ImportError, OSError, ValueError):  # not every system has it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    import math_verify  # noqa: F401


def compare(one: str, gold: str) -> bool:
    """In the child: read both and compare them."""
    from math_verify import verify

    first, second = _read(one), _read(gold)
    if not first or not second:
        return False
    return bool(verify(second, first, timeout_seconds=SECONDS, allow_set_relation_comp=True))


@lru_cache(maxsize=4096)
def _read(text: str) -> list[Any]:
    from math_verify import parse

    return list(parse(f"\\boxed{{{text}}}", parsing_timeout=SECONDS, fallback_mode="no_fallback"))
