"""Libraries that judge answers, in child processes, so that no answer of a model can hang or harm a run.

Math-Verify (github.com/huggingface/Math-Verify) stops long computations by an alarm that only the main thread
may set and that big numbers never notice. reasoning-gym's scorers stop nothing, and some evaluate the text
that they are given. A child has a main thread of its own, a limit on its memory, and is killed in the end.
"""

from __future__ import annotations

import importlib
import json
import logging
from contextlib import suppress
from functools import cache, lru_cache
from typing import Any

from saerl_fast.errors import SaerlError
from saerl_fast.prompts.reasoning_gym import score
from saerl_fast.rl.worker import Died, Late, Worker

SECONDS = 3  # for Math-Verify to read an expression, and to compare two
MOST = 10.0  # seconds for all of it, after which the child is killed
MEMORY = 8 << 30  # bytes of addresses that a child may take


@lru_cache(maxsize=4096)
def same_expression(one: str, gold: str) -> bool:
    """Whether Math-Verify finds two LaTeX expressions equal; False where that takes too long."""
    return bool(_asked("math_verify", "compare", one, gold))


def solved(candidate: str, entry: str) -> bool:
    """Whether reasoning-gym's scorer gives full marks to a candidate for an entry (JSON); False where that
    takes too long or raises. SaerlError without the package, and on an unknown generator."""
    return bool(_asked("reasoning_gym", "mark", candidate, entry))


def _asked(package: str, function: str, *args: str) -> Any:
    try:
        return _worker(package).call(f"{__name__}:{function}", *args, seconds=MOST)
    except (Late, Died):
        return False


@cache
def _worker(package: str) -> Worker:
    return Worker((f"{__name__}:prepare", (package,)))


# --- in the child ------------------------------------------------------------------------------------


def prepare(package: str) -> None:
    """A limit on the memory, the import, and no notices that a text takes too long."""
    logging.disable(logging.CRITICAL)
    with suppress(ImportError, OSError, ValueError):  # not every system has it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        importlib.import_module(package)
    except ImportError:
        name = package.replace("_", "-")
        raise SaerlError(f"the reward {name} needs its package; pip install {name}") from None


def compare(one: str, gold: str) -> bool:
    """Read both and compare them."""
    from math_verify import verify

    first, second = _read(one), _read(gold)
    if not first or not second:
        return False
    options = {"timeout_seconds": SECONDS, "allow_set_relation_comp": True}
    return (
        bool(verify(second, first, **options))
        or bool("i" in one + gold and verify(_complex(second), _complex(first), **options))
        or ("=" in one and "=" in gold and any(_multiple(a, b) for a in first for b in second))
    )


def _multiple(one: Any, gold: Any) -> bool:
    """Whether one equation is a multiple of the other; one that says what a variable is has no such."""
    from sympy import Eq, cancel

    if not (isinstance(one, Eq) and isinstance(gold, Eq)) or gold.lhs.is_Symbol or gold.rhs.is_Symbol:
        return False
    sides = one.lhs - one.rhs, gold.lhs - gold.rhs
    if not all(side.free_symbols and side.is_polynomial() for side in sides):
        return False
    return bool(cancel(sides[0] / sides[1]).is_number)


def _complex(read: list[Any]) -> list[Any]:
    """What `_read` gave with the letter i as the imaginary unit, powers of e multiplied out."""
    from sympy import Expr, I, expand_complex

    made = [
        item.subs({s: I for s in item.free_symbols if s.name == "i"}) if isinstance(item, Expr) else item
        for item in read
    ]
    return [expand_complex(item) if isinstance(item, Expr) and item.has(I) else item for item in made]


@lru_cache(maxsize=4096)
def _read(text: str) -> list[Any]:
    from math_verify import parse

    return list(parse(f"\\boxed{{{text}}}", parsing_timeout=SECONDS, fallback_mode="no_fallback"))


def mark(candidate: str, text: str) -> bool:
    """Whether the scorer of the entry's generator gives full marks."""
    source = _source(json.loads(text)["metadata"]["source_dataset"])
    try:
        return bool(score(source, candidate, text) >= 0.99)
    except (Exception, SystemExit):  # on text they cannot parse (prime_factorization does)
        return False


@cache
def _source(generator: str) -> Any:
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(generator, seed=0, size=1)
    except ValueError:
        raise SaerlError(f"column rg_entry names the unknown reasoning-gym generator {generator!r}") from None
