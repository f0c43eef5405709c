"""Prompts as a model reads them: rendering and its limits."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from saerl_fast.config import DataConfig, ModelConfig
from saerl_fast.errors import SaerlError
from saerl_fast.models.load import load_model
from saerl_fast.prompts import render as module
from saerl_fast.prompts.pool import Pool
from saerl_fast.prompts.render import prepare, render
from saerl_fast.records import packed
from saerl_fast.records.packed import Tokens
from tests.prompt_files import message_of


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = ["<s>", "<unk>", "user", "system", ":", "go"]
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ m['role'] }} : {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} go{% endif %}"
)


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def small_pool() -> Pool:
    chat = [{"role": "system", "content": "short"}, {"role": "user", "content": "b c"}]
    return Pool({"prompt_id": ["0", "1"], "prompt": ["a {b}", chat], "answer": ["1", "2"]})


def test_plain_rendering_joins_messages(tokenizer):
    assert render(small_pool(), tokenizer, DataConfig()) == ["a {b}", "short\n\nb c"]
    assert "chat=always" in message_of(render, small_pool(), tokenizer, DataConfig(chat="always"))


def test_a_chat_without_a_template_is_said(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        render(small_pool(), tokenizer, DataConfig(chat="never"))
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        render(small_pool(), tokenizer, DataConfig())
    assert "no chat template: the messages of 1 prompts are joined by blank lines" in caplog.text


def test_a_chat_has_the_tokens_that_the_model_is_used_with(chat_tokenizer):
    pool = small_pool()
    texts = render(pool, chat_tokenizer, DataConfig())
    assert texts == ["<s> user : a {b} go", "<s> system : short user : b c go"]
    ids = prepare(pool, chat_tokenizer).ids
    assert ids[0][0] == 0 and [row.count(0) for row in ids] == [1, 1]
    chats = [[{"role": "user", "content": "a {b}"}], pool.column("prompt")[1]]
    for template in (
        TEMPLATE,
        TEMPLATE.replace("{{ bos_token }}", ""),
    ):  # written by the template, or by nobody
        chat_tokenizer.chat_template = template
        wanted = chat_tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=True)
        wanted = wanted["input_ids"] if not isinstance(wanted, list) else wanted
        assert prepare(pool, chat_tokenizer).ids == wanted
    plain = prepare(pool, chat_tokenizer, DataConfig(chat="never"))
    assert plain.texts[0] == "a {b}" and plain.ids[0][0] == 0


def test_no_prompt_ends_in_an_end_token(tokenizer):
    from tokenizers.processors import TemplateProcessing

    core = tokenizer.backend_tokenizer
    before = core.post_processor
    core.post_processor = TemplateProcessing(
        single="<s> $A go", special_tokens=[("<s>", 0), ("go", 5)]
    )  # as with add_eos_token
    tokenizer.eos_token = "go"
    try:
        assert tokenizer("user :")["input_ids"] == [0, 2, 4, 5]
        pool = Pool({"prompt_id": ["0", "1"], "prompt": ["user :", "user go"], "answer": ["system", ""]})
        made = prepare(pool, tokenizer)
        assert made.ids == [[0, 2, 4], [0, 2, 5]] and made.answer_ids == [[3], []]
    finally:
        core.post_processor, tokenizer.eos_token = before, None


def test_arguments_reach_the_chat_template(chat_tokenizer):
    chat_tokenizer.chat_template = TEMPLATE + "{% if enable_thinking is false %} :{% endif %}"
    pool = small_pool()
    cfg = DataConfig(chat_template_kwargs={"enable_thinking": False})
    assert render(pool, chat_tokenizer, cfg)[0] == "<s> user : a {b} go :"
    assert render(pool, chat_tokenizer, DataConfig())[0] == "<s> user : a {b} go"
    wrong = DataConfig(chat_template_kwargs={"nothink": True})
    assert "does not read 'nothink'" in message_of(render, pool, chat_tokenizer, wrong)
    ours = DataConfig(chat_template_kwargs={"tokenize": True})
    assert "data.chat_template_kwargs.tokenize" in message_of(render, pool, chat_tokenizer, ours)
    assert "needs a chat template" in message_of(render, pool, chat_tokenizer, replace(cfg, chat="never"))


def test_an_answer_that_was_begun_is_continued(chat_tokenizer, caplog):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    pool = Pool({"prompt_id": ["0", "1"], "prompt": [chat, "a"], "answer": ["", ""]})
    with caplog.at_level(logging.WARNING):
        texts = render(pool, chat_tokenizer, DataConfig(prefill=" d"))
    assert texts == ["<s> user : a assistant : b c d", "<s> user : a go d"]
    assert "1 of 2 prompts end with a message of the assistant" in caplog.text
    assert render(pool, chat_tokenizer, DataConfig(chat="never", prefill="!")) == ["a\n\nb c!", "a!"]


@pytest.mark.parametrize(
    "fault", ["{{ 1 + messages[0]['content'] }}", "{{ range(9999999999) }}", "{{ 1 / 0 }}"]
)
def test_whatever_a_template_raises_is_one_sentence(chat_tokenizer, fault):
    chat_tokenizer.chat_template = fault
    message = message_of(render, small_pool(), chat_tokenizer, DataConfig())
    assert (
        "the chat template rejects prompt '0' with roles user (" in message and "data.chat=never" in message
    )


def test_messages_that_a_template_leaves_out_are_said_or_refused(chat_tokenizer, caplog):
    only = "{% for m in messages if m.role == 'user' %}{{ m.content | trim }} {% endfor %}go"
    chat_tokenizer.chat_template = only
    assert render(small_pool(), chat_tokenizer, DataConfig()) == ["a {b} go", "b c go"]
    words = "leaves out messages of 1 of 2 prompts, such as that of the role system of prompt '1'"
    assert words in caplog.text
    caplog.clear()
    chat_tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }} {% endfor %}go"
    assert render(small_pool(), chat_tokenizer, DataConfig())[1] == "SHORT B C go"
    assert "leaves out" not in caplog.text
    chat_tokenizer.chat_template = only.replace("user", "tool")
    message = message_of(render, small_pool(), chat_tokenizer, DataConfig())
    assert "leaves out the last message of prompt '0' with roles user" in message


def test_prompts_have_the_same_date_on_every_day(chat_tokenizer, caplog):
    chat_tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        '{{ date_string }} {{ strftime_now("%Y-%m") }}' + TEMPLATE
    )
    assert render(small_pool(), chat_tokenizer, DataConfig())[0] == "26 Jul 2024 2024-07<s> user : a {b} go"
    assert "prompts have 26 Jul 2024 in its place" in caplog.text
    own = DataConfig(chat_template_kwargs={"date_string": "today"})
    assert render(small_pool(), chat_tokenizer, own)[0].startswith("today 2024-07<s>")


def test_a_column_of_tools_that_the_template_would_read_is_said(chat_tokenizer, caplog):
    pool = Pool(small_pool().columns | {"tools": [[], []]})
    render(pool, chat_tokenizer, DataConfig())
    assert "tools" not in caplog.text
    chat_tokenizer.chat_template = TEMPLATE + "{% if tools %} :{% endif %}"
    render(pool, chat_tokenizer, DataConfig())
    assert "the column 'tools' is not given to the chat template" in caplog.text


def test_long_prompts_are_dropped_and_counted(chat_tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        pool = prepare(small_pool(), chat_tokenizer, DataConfig(max_prompt_tokens=6))
    assert pool.column("prompt_id") == ["0"] and "dropped 1 of 2 prompts over 6 tokens" in caplog.text
    assert len(prepare(small_pool(), chat_tokenizer, DataConfig(max_prompt_tokens=9))) == 2
    message = message_of(prepare, small_pool(), chat_tokenizer, DataConfig(max_prompt_tokens=2))
    assert "all 2 prompts" in message and "max_prompt_tokens=2" in message and "has 6" in message


@pytest.mark.parametrize(
    ("most", "limit", "kept", "named"),
    [(9, 6, 1, "over 6 tokens (the model"), (6, 9, 1, "over 6 tokens (data."), (9, 9, 2, "")],
)
def test_the_smaller_prompt_limit_holds(chat_tokenizer, caplog, most, limit, kept, named):
    with caplog.at_level(logging.WARNING):
        pool = prepare(small_pool(), chat_tokenizer, DataConfig(max_prompt_tokens=most), limit=limit)
    assert len(pool) == kept and named in caplog.text and bool(caplog.text) == (kept < 2)


def test_prompts_longer_than_the_model_reads_name_that_limit(chat_tokenizer):
    for limit in (2, -5):
        with pytest.raises(SaerlError, match=f"max_new_tokens={limit} .*lower max_new_tokens"):
            prepare(small_pool(), chat_tokenizer, DataConfig(max_prompt_tokens=9), limit=limit)
    with pytest.raises(SaerlError, match="data.max_prompt_tokens=2"):
        prepare(small_pool(), chat_tokenizer, DataConfig(max_prompt_tokens=2), limit=5)


def test_a_chat_template_that_rejects_a_message_names_the_prompt(chat_tokenizer):
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{{ m['content'] }}{% endfor %}"
    )
    message = message_of(render, small_pool(), chat_tokenizer, DataConfig())
    assert "'1'" in message and "System role not supported" in message and "data.chat=never" in message
    assert render(small_pool(), chat_tokenizer, DataConfig(chat="never"))[1] == "short\n\nb c"


@pytest.mark.slow
def test_a_real_chat_template(smollm2):
    _, tokenizer = load_model(ModelConfig(path=str(smollm2)))
    plain, chat = render(small_pool(), tokenizer, DataConfig())
    assert plain.endswith("<|im_start|>user\na {b}<|im_end|>\n<|im_start|>assistant\n")
    assert chat.startswith("<|im_start|>system\nshort<|im_end|>\n") and "SmolLM" not in chat
    ids = tokenizer(chat)["input_ids"]
    assert tokenizer.decode(ids) == chat and ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3


def test_the_tokens_of_many_prompts_are_kept_in_one_array(tokenizer, monkeypatch):
    columns = {
        "prompt_id": list("abcde"),
        "prompt": ["a b", "a", "b c b", "c", "a c"],
        "answer": list("12345"),
    }
    cfg = DataConfig(max_prompt_tokens=3)
    expected = prepare(Pool(columns), tokenizer, cfg)
    monkeypatch.setattr(module, "BLOCK", 2)
    monkeypatch.setattr(packed, "FEW", 2)
    found = prepare(Pool(columns), tokenizer, cfg)
    assert isinstance(found.ids, Tokens) and isinstance(found.answer_ids, Tokens) and len(found) == 4
    assert list(found.ids) == expected.ids and list(found.answer_ids) == expected.answer_ids
    assert found.select([3, 0]).ids == [expected.ids[3], expected.ids[0]]
