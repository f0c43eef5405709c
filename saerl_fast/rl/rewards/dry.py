"""What can be known of a reward before anything slow: golds that it cannot read, and a first call."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from saerl_fast.config import Config, TrainConfig
from saerl_fast.errors import SaerlError
from saerl_fast.rl.rewards import get_reward, score_rewards, with_timeout
from saerl_fast.rl.rewards.answers import THINK_END
from saerl_fast.rl.rewards.ask import Reward, name_of
from saerl_fast.rl.rewards.basic import maths_gold, numeric_gold
from saerl_fast.rl.rewards.call import Together
from saerl_fast.rl.rewards.columns import check_answers

if TYPE_CHECKING:
    from saerl_fast.prompts.pool import Pool

log = logging.getLogger(__name__)

ROWS = 2  # of the first call
NAMED = 5  # unreadable answers that a message names
UNREADABLE: dict[str, tuple[Callable[[Any], Any], str]] = {  # reward: its reader, what it cannot read
    "numeric": (numeric_gold, "hold no number, or several"),
    "maths": (lambda answer: maths_gold(str(answer)),
              "are empty, long solutions without \\boxed or ####, or have braces that do not match"),
    "exact": (lambda answer: str(answer).strip() or None, "are empty"),
}  # fmt: skip
_done: set[str] = set()


def try_reward(config: Config) -> None:
    """Check the configured reward on the configured pools, once for each: its answers, and a first call."""
    from saerl_fast.session import load_pools

    pools = load_pools(config)
    train = config.train
    mark = json.dumps([train.reward, train.reward_weights, pools[0].digest, pools[1].digest])
    if mark not in _done:
        reward = get_reward(train.reward, train.reward_weights)
        read_answers(reward, pools)
        first_call(reward, pools[0], train)
        _done.add(mark)


def read_answers(reward: Reward, pools: tuple[Pool, ...]) -> None:
    """Read every reference answer that a built-in reward will, once for the same reward and answers.

    Those that it cannot read are counted and the first named, in the log; SaerlError when it can read none.
    """
    for part in reward.parts if isinstance(reward, Together) else [reward]:
        name = name_of(part)
        mark = json.dumps([name, sorted({str(answer) for pool in pools for answer in pool.column("answer")})])
        if getattr(part, "built_in", False) and mark not in _done:
            _read_all(name, pools)
            _done.add(mark)


def first_call(reward: Reward, pool: Pool, cfg: TrainConfig) -> None:
    """Call ``reward`` on the first rows with their answers as completions; SaerlError as `score_rewards`."""
    with_answers = (i for i, a in enumerate(pool.column("answer")) if str(a).strip())
    first = pool.select([*with_answers][:ROWS] or range(min(ROWS, len(pool))))
    prompts, answers = first.column("prompt"), [str(a) for a in first.column("answer")]
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for text, prompt in zip(answers, prompts, strict=True)
    ]
    ids = [[0] * max(1, len(text) // 4) for text in answers]  # there is no tokenizer yet
    limited = with_timeout(reward, cfg.reward_timeout)
    if np.isnan(score_rewards(limited, prompts, completions, first.columns, ids=ids)).all():
        log.warning(
            "reward %s gave None for the first %d rows; rows that no reward judges teach nothing",
            name_of(reward),
            len(first),
        )


def _read_all(name: str, pools: tuple[Pool, ...]) -> None:
    kind = name.removesuffix("-think").removesuffix("-boxed")
    if kind not in UNREADABLE:
        return
    read, what = UNREADABLE[kind]
    answers = [answer for pool in pools for answer in pool.column("answer")]
    ids = [str(row) for pool in pools for row in pool.column("prompt_id")]
    check_answers(answers, f"the reward {name}")
    known: dict[str, bool] = {}
    bad = []
    for row, answer in zip(ids, answers, strict=True):
        text = str(answer)
        if text not in known:
            known[text] = read(text) is not None
        if not known[text]:
            bad.append(f"{row} ({text[:30]!r})")
    if not bad:
        return
    shown = ", ".join(bad[:NAMED]) + (f" and {len(bad) - NAMED} more" if len(bad) > NAMED else "")
    if len(bad) == len(answers):
        raise SaerlError(
            f"the reward {name} can read none of the {len(bad)} reference answers: they {what}; {shown}; "
            "choose another train.reward or data.answer_column"
        )
    log.warning(
        "the reward %s cannot read %d of %d reference answers, which %s; such rows never earn anything: %s",
        name,
        len(bad),
        len(answers),
        what,
        shown,
    )


def check_think(names: list[str], tokenizer: Any) -> None:
    """SaerlError when the tokenizer drops the </think> that a reward waits for."""
    if any(name.strip().endswith("-think") for name in names) and THINK_END in tokenizer.all_special_tokens:
        raise SaerlError(
            f"{THINK_END} is a special token of the tokenizer, which completions are decoded without: "
            f"train.reward={','.join(names)} would never pay; use the form without -think"
        )
