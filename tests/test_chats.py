import json

import pytest

from saerl_fast.config import DataConfig
from saerl_fast.errors import SaerlError
from saerl_fast.prompts.chats import is_prefilled, read_prompt, wrap
from saerl_fast.prompts.pool import load_prompts

PLAIN = [{"role": "system", "content": "short"}, {"role": "user", "content": "1+1?"}]


@pytest.mark.parametrize(
    "cell",
    [
        PLAIN,
        tuple(PLAIN),
        [PLAIN[0], {"role": "user", "content": [{"type": "text", "text": "1+1?", "image": None}]}],
        [{"from": "system", "value": "short"}, {"from": "human", "value": "1+1?"}],
        {"role": ["system", "user"], "content": ["short", "1+1?"]},
        {"from": ["system", "human"], "value": ["short", "1+1?"]},
        json.dumps(PLAIN),
        str(PLAIN),
        [{"role": "System", "content": "short"}, {"role": "human", "content": "1+1?"}],
    ],
)
def test_chats_are_read_in_all_their_forms(cell) -> None:
    assert read_prompt(cell) == PLAIN


def test_text_parts_are_joined_and_further_keys_kept() -> None:
    parts = [{"type": "text", "text": "a"}, "b"]
    found = read_prompt([{"role": "user", "content": parts, "name": "x"}, {"from": "gpt", "value": "c"}])
    assert found == [
        {"role": "user", "content": "a\nb", "name": "x"},
        {"role": "assistant", "content": "c"},
    ]
    assert is_prefilled(found) and not is_prefilled(PLAIN) and not is_prefilled("a")
    assert wrap(found, "<{prompt}>")[0]["content"] == "<a\nb>" and wrap(found, "<{prompt}>")[1] == found[1]
    assert wrap("{a}", "{prompt}{b}") == "{a}{b}"


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("  ", "is empty"),
        (None, "is null"),
        (3, "is a int"),
        ({"role": "user"}, "is a dict"),
        ([], "no chat messages"),
        ([{"content": "a"}], "without a role"),
        (["a"], "without a role"),
        ([{"role": "user", "content": None}], "without text content"),
        ([{"role": "user", "content": []}], "without text content"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "type image, and only text is read"),
        ([{"from": "alien", "value": "a"}], "from 'alien'.*user, assistant or system"),
        ([{"role": "user", "content": " "}], "no message with a text"),
        (str(PLAIN).replace("}, {", "}\n {"), "as Python prints it; write the column with json.dumps"),
        ([{"role": "assistant", "content": "a"}], "no message but the assistant's"),
    ],
)
def test_other_cells_are_refused_in_a_sentence(cell, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompt(cell)


def test_sharegpt_files_are_read_and_faults_name_the_row(tmp_path) -> None:
    path = tmp_path / "chats.jsonl"
    rows = [{"conversations": [{"from": "human", "value": f"{i}?"}], "answer": str(i)} for i in range(2)]
    path.write_text("\n".join(map(json.dumps, rows)))
    cfg = DataConfig(prompt_column="conversations", template="Q: {prompt}")
    assert load_prompts(str(path), cfg).column("prompt")[1] == [{"role": "user", "content": "Q: 1?"}]
    rows[1]["conversations"][0]["value"] = None
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SaerlError, match="row 1: the prompt has a chat message without text content"):
        load_prompts(str(path), cfg)


def test_text_that_is_no_chat_stays_text_and_calls_of_tools_have_none() -> None:
    for text in (
        *('[{"role": "user"', "[{'role': 'user'}] is what?", '["role": 3]', '[1, 2] "role":'),
        *('[{"role": "a"}, 3]', "[x] and more"),
    ):
        assert read_prompt(text) == text
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    found = read_prompt([PLAIN[1], call, {"role": "tool", "content": "2"}])
    assert [message["role"] for message in found] == ["user", "assistant", "tool"]
    assert found[1] == call | {"content": ""} and call["content"] is None
