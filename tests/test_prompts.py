"""Prompts as a model reads them: rendering and its limits."""

from __future__ import annotations

import logging

import pytest

from saerl_fast.config import DataConfig
from saerl_fast.errors import SaerlError
from saerl_fast.prompts.pool import Pool
from saerl_fast.prompts.render import prepare, render
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


def test_chat_rendering_starts_with_one_bos_once_tokenised(chat_tokenizer):
    texts = render(small_pool(), chat_tokenizer, DataConfig())
    assert texts == [" user : a {b} go", " system : short user : b c go"]
    ids = chat_tokenizer(texts[0])["input_ids"]
    assert ids[0] == 0 and ids.count(0) == 1
    assert render(small_pool(), chat_tokenizer, DataConfig(chat="never"))[0] == "a {b}"
    bos = chat_tokenizer.bos_token
    quoted = Pool({"prompt_id": ["0"], "prompt": [f"a {bos} b"], "answer": [""]})
    only_the_first = [f" user : a {bos} b go"]
    assert render(quoted, chat_tokenizer, DataConfig()) == only_the_first


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
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    plain, chat = render(small_pool(), tokenizer, DataConfig())
    assert plain.endswith("<|im_start|>user\na {b}<|im_end|>\n<|im_start|>assistant\n")
    assert chat.startswith("<|im_start|>system\nshort<|im_end|>\n") and "SmolLM" not in chat
    ids = tokenizer(chat)["input_ids"]
    assert tokenizer.decode(ids) == chat and ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
