"""Which tokens are a prompt's own: whatever the template, the tokenizer and the contents."""

from __future__ import annotations

from functools import partial

import pytest

from saerl_fast.config import DataConfig
from saerl_fast.prompts.pool import Pool
from saerl_fast.prompts.render import prepare
from tests.tiny_lm import char_tokenizer

PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}: {{ m['content'] }}>{% endfor %}"
    "{% if add_generation_prompt %}answer:{% endif %}"
)
STRIPPED = PLAIN.replace("m['content']", "m['content'] | trim")
TWICE = PLAIN.replace("{{ m['content'] }}", "{{ m['content'] }} {{ m['content'] }}")
LOOKS = PLAIN.replace("{{ m['content'] }}", "{{ m['content'].split('.')[-1] }}")  # only the last part


def owned(template: str, prompts: list, prefill: str = "", **tokenizer) -> list[list[str]]:
    made = char_tokenizer()
    made.chat_template = template
    for name, value in tokenizer.items():
        setattr(type(made), name, value)
    columns = {"prompt_id": [str(i) for i in range(len(prompts))], "prompt": prompts}
    found = prepare(Pool({**columns, "answer": [""] * len(prompts)}), made, DataConfig(prefill=prefill))
    assert len(found.own) == len(found.select([0]).own) + len(prompts) - 1
    decode = partial(made.decode, skip_special_tokens=False)
    return [
        [decode(row[a:b]) for a, b in zip(own[::2], own[1::2], strict=True)]
        for row, own in zip(found.ids, found.own, strict=True)
    ]


@pytest.mark.parametrize("prefill", ["", "so "])
def test_the_contents_are_found_whatever_they_say(prefill):
    chat = [
        {"role": "system", "content": "be good"},
        {"role": "user", "content": "user: "},
        {"role": "assistant", "content": "answer:"},
        {"role": "user", "content": "why?"},
    ]
    prompts = ["what is 1+1?", "user: answer:", chat]
    assert owned(PLAIN, prompts, prefill) == [
        ["what is 1+1?"],
        ["user: answer:"],
        ["be good", "user: ", "answer:", "why?"],
    ]


def test_a_template_that_strips_contents(caplog):
    assert owned(STRIPPED, ["  what? ", "b"]) == [["what?"], ["b"]]
    assert not caplog.records


def test_what_cannot_be_told_is_pooled_whole_and_counted(caplog):
    found = owned(LOOKS, ["one. two", "b"])
    assert found[1] == ["b"] and len(found[0]) == 1 and found[0][0].endswith("answer:")
    assert "in 1 of 2 prompts" in caplog.text


def test_a_template_that_says_contents_twice(caplog):
    chat = [{"role": "system", "content": "be"}, {"role": "user", "content": "what?"}]
    found = owned(TWICE, [chat, "b"])
    assert [len(parts) for parts in found] == [1, 1] and "in 2 of 2 prompts" in caplog.text


def test_plain_prompts_are_all_their_own():
    made = prepare(Pool({"prompt_id": ["0"], "prompt": ["a"], "answer": [""]}), char_tokenizer())
    assert made.own is None and made.select([0]).own is None
