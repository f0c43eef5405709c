from __future__ import annotations

import csv
import json
import logging
from dataclasses import replace

import pytest

from saerl_fast.config import DataConfig
from saerl_fast.errors import SaerlError
from saerl_fast.prompts import files as prompt_files
from saerl_fast.prompts import reasoning_gym as reasoning_gym_pool
from saerl_fast.prompts.pool import Pool, load_prompts, load_split
from saerl_fast.prompts.render import prepare, render

ROWS = [
    {"prompt": f"What is {i} + {i}? {{braces}}", "answer": str(2 * i), "quality_label": i % 3 and 1, "n": i}
    for i in range(1, 13)
]


def save(path, rows):
    """``rows`` in the format that the suffix names."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def load(path, **settings) -> Pool:
    return load_prompts(str(path), DataConfig(**settings))


def message_of(call, *args, **kwargs) -> str:
    with pytest.raises(SaerlError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", prompt_files.SUFFIXES)
def test_every_format_gives_the_same_pool(tmp_path, suffix):
    pool = load(save(tmp_path / f"pool{suffix}", ROWS))
    assert pool.column("prompt_id") == [str(i) for i in range(12)]
    assert pool.column("prompt") == [row["prompt"] for row in ROWS]
    assert pool.column("answer") == [row["answer"] for row in ROWS]
    assert pool.column("quality_label") == [row["quality_label"] for row in ROWS]
    assert len(pool) == 12


def test_columns_of_json_and_nulls_of_csv(tmp_path):
    path = tmp_path / "pool.json"
    path.write_text(json.dumps({"prompt": ["a", "b"], "answer": [1, 2.5]}))
    assert load(path).column("answer") == ["1", "2.5"]
    path = tmp_path / "pool.csv"
    path.write_text('\ufeffprompt,answer,rate,note\n"a, b",01,0.5,x\nc,2,,\n', encoding="utf-8")
    pool = load(path)
    assert pool.column("prompt") == ["a, b", "c"] and pool.column("answer") == ["01", "2"]
    assert pool.column("rate") == [0.5, None] and pool.column("note") == ["x", None]


def test_named_columns_ids_and_template(tmp_path):
    rows = [{"q": "2 {x}", "sol": 4, "key": 7}, {"q": "3", "sol": 6, "key": 9}]
    path = save(tmp_path / "pool.jsonl", rows)
    names = {"prompt_column": "q", "answer_column": "sol", "id_column": "key"}
    pool = load(path, **names, template="Put {prompt} in \\boxed{}.")
    assert pool.column("prompt") == ["Put 2 {x} in \\boxed{}.", "Put 3 in \\boxed{}."]
    assert pool.column("prompt_id") == ["7", "9"] and pool.column("answer") == ["4", "6"]
    assert pool.column("q") == ["2 {x}", "3"]  # rewards still see the data set's own columns
    assert load(path, **(names | {"answer_column": None})).column("answer") == ["", ""]
    message = message_of(load, path, **names, template="no place")
    assert "'no place'" in message and "{prompt}" in message


def test_chat_messages_keep_their_roles(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    for suffix in (".jsonl", ".parquet"):
        path = save(tmp_path / f"pool{suffix}", [{"prompt": chat, "answer": "2"}])
        (prompt,) = load(path, template="{prompt} Answer:").column("prompt")
        assert prompt == [chat[0], {"role": "user", "content": "1+1? Answer:"}]


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        (None, "is null"),
        ("  \n", "is empty"),
        (3, "is a int"),
        ([], "has no chat messages"),
        ([{"role": "assistant", "content": "hm"}], "no message but the assistant's"),
        ([{"content": "x"}], "without a role"),
        ([{"role": "user", "content": None}], "without text content"),
    ],
    ids=lambda x: x if isinstance(x, str) and x.strip() else "",
)
def test_a_bad_prompt_names_its_row(tmp_path, prompt, fault):
    path = save(
        tmp_path / "pool.jsonl", [{"prompt": "fine", "answer": "1"}, {"prompt": prompt, "answer": "1"}]
    )
    message = message_of(load, path)
    assert "pool.jsonl row 1" in message and fault in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"prompt": "x", "answer": "1"}\n\n{"prompt": \n', ["a.jsonl line 3", "JSON"]),
        ("a.jsonl", "[1]\n", ["a.jsonl line 1", "object", "list"]),
        ("a.jsonl", "", ["no column 'prompt'", "no columns"]),
        ("a.json", "[{]", ["a.json line 1", "JSON"]),
        ("a.json", '"text"', ["list of objects"]),
        ("a.json", '{"prompt": ["a"], "answer": []}', ["different lengths"]),
        ("a.json", '{"prompt": [], "answer": []}', ["a.json holds no rows"]),
        ("a.csv", "prompt,answer\na,1,2\n", ["a.csv line 2", "cells"]),
        ("a.csv", "prompt,answer\na\n", ["a.csv line 2", "cells"]),
        ("a.csv", "prompt,answer\n", ["a.csv holds no rows"]),
        ("a.parquet", "not parquet", ["a.parquet is not a Parquet file"]),
        (
            "a.jsonl",
            '{"prompt": "x", "solution": "1"}',
            ["'answer'", "data.answer_column", "prompt, solution"],
        ),
        ("a.jsonl", '{"prompt": "x", "answer": null}', ["row 0", "answer is null"]),
    ],
    ids=lambda x: x if isinstance(x, str) and len(x) < 10 else "",
)
def test_bad_files_are_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    message = message_of(load, tmp_path / name)
    assert all(word in message for word in words), message


def test_files_in_another_encoding_are_one_sentence(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"prompt": "caf\u00e9", "answer": "1"}'.encode("latin-1"))
    assert "UTF-8" in message_of(load, tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", ["data.train is empty"]),
        ("nowhere/pool.jsonl", ["nowhere/pool.jsonl does not exist", "data.train"]),
        ("pool.txt?", ["pool.txt?", ".parquet", "reasoning-gym:NAME"]),
        ("reasoning-gym:chain_sums", ["chain_sums", "did you mean chain_sum?"]),
        ("reasoning-gym:zzzz", ["zzzz", "with bands: ", "products"]),
        ("reasoning-gym:chain_sum@9", ["chain_sum@9", "0 to 3"]),
        ("reasoning-gym:chain_sum@x", ["chain_sum@x", "0 to 3"]),
        ("reasoning-gym:word_sorting@1", ["word_sorting", "no difficulty bands"]),
        ("reasoning-gym:rush_hour", ["rush_hour", "own answer"]),
    ],
)
def test_bad_specs_are_one_sentence(spec, words):
    if "gym" in spec:
        pytest.importorskip("reasoning_gym")
    message = message_of(load_prompts, spec, DataConfig())
    assert all(word in message for word in words), message


def test_duplicate_ids_name_both_rows(tmp_path):
    path = save(tmp_path / "pool.jsonl", [row | {"key": i % 5} for i, row in enumerate(ROWS)])
    message = message_of(load, path, id_column="key")
    assert "'0'" in message and "rows 0 and 5" in message


def test_hub_sets_are_asked_for_by_split_and_configuration(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        if args[0] == "gone/gone":
            raise RuntimeError("not on the hub\nsecond line")
        return datasets.Dataset.from_dict({"question": ["a", "b"], "answer": ["1", "2"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    cfg = DataConfig(prompt_column="question", hub_config="main", split="train", eval_split="validation")
    assert load_prompts("openai/gsm8k", cfg).column("prompt") == ["a", "b"]
    assert load_prompts("openai/gsm8k", cfg, split_role="eval").column("prompt_id") == ["eval-0", "eval-1"]
    assert asked == [
        (("openai/gsm8k", "main"), {"split": "train"}),
        (("openai/gsm8k", "main"), {"split": "validation"}),
    ]
    message = message_of(load_prompts, "gone/gone", cfg)
    assert "gone/gone (configuration main)" in message and "not on the hub" in message


def test_the_held_out_split_is_seeded_and_disjoint(tmp_path):
    twice = [*ROWS, ROWS[0], ROWS[1]]  # copies must not sit on both sides
    cfg = DataConfig(train=save(tmp_path / "pool.jsonl", twice), eval_size=5)
    train, held_out = load_split(cfg, seed=1)
    assert len(held_out) == 5 and len(set(held_out.column("prompt"))) == 5
    assert not set(train.column("prompt")) & set(held_out.column("prompt"))
    assert set(train.column("prompt")) | set(held_out.column("prompt")) == {r["prompt"] for r in ROWS}
    assert load_split(cfg, seed=1)[1].column("prompt_id") == held_out.column("prompt_id")
    assert any(load_split(cfg, seed=s)[1].column("prompt_id") != held_out.column("prompt_id") for s in (2, 3))
    limited, few = load_split(replace(cfg, limit=3, eval_limit=2), seed=1)
    assert limited.column("prompt_id") == train.column("prompt_id")[:3]
    assert few.column("prompt_id") == held_out.column("prompt_id")[:2]


def test_only_rows_that_the_filter_allows_are_held_out(tmp_path):
    rows = [row | {"quality_label": None if row["n"] == 1 else row["quality_label"]} for row in ROWS]
    cfg = DataConfig(train=save(tmp_path / "pool.jsonl", rows), eval_size=7, eval_filter="quality_label")
    train, held_out = load_split(cfg)
    assert held_out.column("quality_label") == [1] * 7
    assert sorted(held_out.column("n") + train.column("n")) == list(range(1, 13))
    message = message_of(load_split, replace(cfg, eval_size=8))
    assert "eval_size=8" in message and "7 distinct" in message and "quality_label" in message
    assert "'good'" in message_of(load_split, replace(cfg, eval_filter="good"))


@pytest.mark.parametrize("rows", [1, 5], ids=["one row", "as many as asked"])
def test_a_pool_too_small_to_hold_out_is_one_sentence(tmp_path, rows):
    cfg = DataConfig(train=save(tmp_path / "pool.jsonl", ROWS[:rows]), eval_size=5)
    message = message_of(load_split, cfg)
    assert "eval_size=5" in message and f"{rows} rows" in message and "data.eval" in message
    assert "eval_size=0" in message_of(load_split, replace(cfg, eval_size=0))


def test_training_rows_that_are_also_evaluated_are_dropped(tmp_path, caplog):
    everything = save(tmp_path / "pool.jsonl", ROWS)
    cfg = DataConfig(train=everything, eval=save(tmp_path / "eval.jsonl", ROWS[:3]))
    with caplog.at_level(logging.WARNING):
        train, held_out = load_split(cfg)
    assert train.column("n") == list(range(4, 13)) and held_out.column("n") == [1, 2, 3]
    assert "dropped 3" in caplog.text
    assert "every prompt" in message_of(load_split, replace(cfg, eval=everything))


def test_a_pool_survives_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    pool = load(save(tmp_path / "pool.jsonl", [*ROWS[:2], ROWS[2] | {"quality_label": None}]))
    assert Pool.from_parquet(pool.to_parquet(tmp_path / "out" / "pool.parquet")) == pool
    mixed = Pool(pool.columns | {"odd": [1, "a", None]})
    assert "one type" in message_of(mixed.to_parquet, tmp_path / "mixed.parquet")
    assert not (tmp_path / "mixed.parquet").exists()
    assert "does not exist" in message_of(Pool.from_parquet, tmp_path / "none.parquet")


def test_pool_refuses_uneven_and_missing_columns():
    good = {"prompt_id": ["a", "b"], "prompt": ["x", "y"], "answer": ["1", "2"]}
    pool = Pool(good)
    assert pool.select([1, 0]).column("prompt") == ["y", "x"]
    assert "'extra'" in message_of(pool.column, "extra")
    assert "differ in length" in message_of(Pool, good | {"n": [1]})
    assert "'answer'" in message_of(Pool, {"prompt_id": [], "prompt": []})


# --- reasoning-gym ---------------------------------------------------------------------------------


def test_reasoning_gym_rows_are_spread_seeded_and_disjoint():
    pytest.importorskip("reasoning_gym")
    cfg = DataConfig(train="reasoning-gym:chain_sum@0, gcd", size=103, eval_size=21)
    train, held_out = load_split(cfg, seed=5)
    assert (len(train), len(held_out)) == (103, 21)
    cells = [
        f"{task}@{level}" for task, level in zip(train.column("task"), train.column("level"), strict=True)
    ]
    assert cells[:5] == ["chain_sum@0", "gcd@0", "gcd@1", "gcd@2", "gcd@3"]
    assert [cells.count(cell) for cell in cells[:5]] == [21, 21, 21, 20, 20]
    assert not set(train.column("prompt")) & set(held_out.column("prompt"))
    assert len(set(train.column("prompt"))) == 103
    assert load_split(cfg, seed=5) == (train, held_out)
    other_train, other_eval = load_split(cfg, seed=6)
    assert other_train.column("prompt") != train.column("prompt")
    # The halves stay apart across seeds too, or a second seed would train on the first one's evaluation.
    assert not set(train.column("prompt")) & set(other_eval.column("prompt"))
    entry = json.loads(train.column("rg_entry")[0])
    assert entry["question"] == train.column("prompt")[0] and entry["answer"] == train.column("answer")[0]


def test_reasoning_gym_bands_are_those_of_the_file():
    pytest.importorskip("reasoning_gym")
    for level, band in enumerate(reasoning_gym_pool.bands()["chain_sum"]):
        pool = load_prompts(f"reasoning-gym:chain_sum@{level}", DataConfig(size=20))
        terms = [json.loads(text)["metadata"]["num_terms"] for text in pool.column("rg_entry")]
        assert band["min_terms"] <= min(terms) and max(terms) <= band["max_terms"]


def test_an_exhausted_band_is_said_and_not_repeated(caplog):
    pytest.importorskip("reasoning_gym")
    with caplog.at_level(logging.WARNING):
        pool = load_prompts("reasoning-gym:products@0", DataConfig(size=500))
    assert 50 < len(pool) < 101 and len(set(pool.column("prompt"))) == len(pool)
    assert f"products@0 has only {len(pool)} distinct train questions (500 asked)" in caplog.text


def test_a_generator_without_bands_uses_its_own_settings():
    pytest.importorskip("reasoning_gym")
    pool = load_prompts("reasoning-gym:word_sorting", DataConfig(size=3))
    assert pool.column("level") == [-1, -1, -1] and pool.column("prompt_id")[0] == "word_sorting/train/0"


# --- rendering -------------------------------------------------------------------------------------


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
    "fault", ["{{ 1 + messages[0]['content'] }}", "{{ range(10 ** 30) }}", "{{ 1 / 0 }}"]
)
def test_whatever_a_template_raises_is_one_sentence(chat_tokenizer, fault):
    chat_tokenizer.chat_template = fault
    message = message_of(render, small_pool(), chat_tokenizer, DataConfig())
    assert (
        "the chat template rejects prompt '0' with roles user (" in message and "data.chat=never" in message
    )


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


@pytest.mark.parametrize("value", [0, -3])
@pytest.mark.parametrize("name", ["limit", "eval_limit"])
def test_a_row_limit_keeps_at_least_one_row(tmp_path, name, value):
    path = save(tmp_path / "pool.jsonl", ROWS)
    cfg = DataConfig(train=path, eval_size=2, **{name: value})
    for call in (lambda: load_split(cfg), lambda: load_prompts(path, cfg)):
        assert f"data.{name}={value} " in message_of(call)
    train, held_out = load_split(replace(cfg, limit=1, eval_limit=1))
    assert len(train) == len(held_out) == 1


@pytest.mark.slow
def test_a_real_chat_template(smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    plain, chat = render(small_pool(), tokenizer, DataConfig())
    assert plain.endswith("<|im_start|>user\na {b}<|im_end|>\n<|im_start|>assistant\n")
    assert chat.startswith("<|im_start|>system\nshort<|im_end|>\n") and "SmolLM" not in chat
    ids = tokenizer(chat)["input_ids"]
    assert tokenizer.decode(ids) == chat and ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
