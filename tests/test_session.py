"""A prompt's text and token ids are made once, and everything reads the same ones."""

import logging
from collections import Counter

import pytest
import torch

from saerl_fast.config import load_config
from saerl_fast.errors import SaerlError
from saerl_fast.prompts.pool import Pool
from saerl_fast.session import Session, load_pools
from saerl_fast.stages.console import Echo
from saerl_fast.stages.train import train_stage
from tests.test_pipeline import ROOT, SMALL
from tests.tiny_lm import char_tokenizer, prompts_of, session_of, tiny_model, token_rows


def pool(*prompts: str) -> Pool:
    names = [str(i) for i in range(len(prompts))]
    return Pool({"prompt_id": names, "prompt": list(prompts), "answer": names})


def test_one_train_renders_and_tokenises_each_pool_once(monkeypatch, tmp_path):
    """SAE, labels, scores, warm-up, rollouts and evaluations read what the session made."""
    from transformers import PreTrainedTokenizerBase

    from saerl_fast.prompts import render

    monkeypatch.chdir(ROOT)
    calls: Counter[str] = Counter()
    rendered, tokenised = render.render, PreTrainedTokenizerBase.__call__

    def counted(owner, name, real):
        def call(*args, **options):
            calls[name] += 1
            return real(*args, **options)

        monkeypatch.setattr(owner, name, call)

    counted(render, "render", rendered)
    counted(PreTrainedTokenizerBase, "__call__", tokenised)
    settings = [*SMALL, "train.steps=1", "train.warmup.steps=1", "difficulty.n_labels=8"]
    config = load_config("examples/demo.yaml", [*settings, f"run_dir={tmp_path / 'run'}"])
    train_stage(config, Echo(quiet=True))
    # Prompts and answers of the two pools, and a letter: what does this tokenizer append?
    assert calls == {"render": 2, "__call__": 6}


def test_a_selection_keeps_texts_and_ids_with_their_rows():
    made = prompts_of(["a", "bb+c", "ddd"], ["1", "", "33"]).select([2, 0])
    assert made.texts == ["ddd", "a"] and made.column("answer") == ["33", "1"]
    assert made.ids == token_rows(["ddd", "a"]) and made.answer_ids == token_rows(["33", "1"])


def test_a_prompt_without_tokens_is_refused_by_its_id():
    with pytest.raises(SaerlError, match=r"prompt '1' \(''\) has no tokens; remove it from the pool"):
        session_of(tiny_model(), pool("a", ""))


def test_prompts_leave_room_for_new_tokens(caplog):
    """The tiny model reads 128 positions."""
    rows = pool("a" * 100, "b" * 108, "c" * 109)
    with caplog.at_level(logging.WARNING):
        session = Session.of(tiny_model(), char_tokenizer(), rows, pool("a"), max_new_tokens=20)
    assert [len(row) for row in session.train.ids] == [100, 108]
    assert "dropped 1 of 3 prompts over 108 tokens" in caplog.text


def test_pools_are_read_again_when_their_file_has_changed(tmp_path):
    file = tmp_path / "pool.jsonl"
    rows = '{"prompt": "a", "answer": "1"}\n{"prompt": "b", "answer": "2"}\n'
    file.write_text(rows)
    config = load_config(None, [f"data.train={file}", "data.eval_size=1"])
    first = load_pools(config)
    assert load_pools(config)[0] is first[0]
    file.write_text(rows + '{"prompt": "c", "answer": "3"}\n')
    assert len(load_pools(config)[0]) == 2 and first[0].digest != load_pools(config)[0].digest


def test_rollouts_training_and_scoring_read_the_same_ids():
    from saerl_fast.config import RolloutConfig
    from saerl_fast.rl.generate import generate
    from saerl_fast.rl.warmup import answer_rows

    model = tiny_model()
    prompts = session_of(model, pool("1+1=", "a longer one: ", "z")).train
    made = generate(model, char_tokenizer(), prompts.ids, RolloutConfig(group_size=2, max_new_tokens=2))
    ids, starts, _ = answer_rows(model, char_tokenizer(), prompts.ids, prompts.answer_ids)
    assert made.prompt_lens.tolist() == starts.tolist() == [4, 14, 1]
    joined, _, _ = made.sequences()
    for row, start in enumerate(starts.tolist()):
        assert torch.equal(joined[2 * row, :start], ids[row, :start])


def test_a_session_is_made_of_pools():
    with pytest.raises(SaerlError, match="train must be a Pool, not a list"):
        Session.of(None, None, ["1+1="], ["2+2="])
    with pytest.raises(SaerlError, match="evaluation must be a Pool, not a NoneType"):
        Session.of(tiny_model(), char_tokenizer(), pool("1+1="), None)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            lambda config: setattr(config.sae, "layer", 99),
            "sae.layer=99 does not exist in a model of . blocks",
        ),
        (lambda config: config.compare.seeds.append(-3), "compare.seeds=.*-3 must hold numbers at least 0"),
    ],
)
def test_what_the_model_cannot_follow_is_said_before_it_is_loaded(monkeypatch, changed, words):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("saerl_fast.session.load_model", lambda *_: pytest.fail("loaded"))
    config = load_config("examples/demo.yaml")
    changed(config)
    with pytest.raises(SaerlError, match=words):
        Session.open(config)
