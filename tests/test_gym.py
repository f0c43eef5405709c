import json

import pytest

from saerl_fast.config import DataConfig
from saerl_fast.errors import SaerlError
from saerl_fast.prompts.pool import load_prompts
from saerl_fast.prompts.reasoning_gym import bands, score
from saerl_fast.rl.rewards import get_reward, score_rewards


def one(completion: str, **columns) -> float:
    given = {"answer": ["1"]} | {key: [value] for key, value in columns.items()}
    return float(score_rewards(get_reward("reasoning-gym"), ["?"], [completion], given)[0])


@pytest.mark.parametrize("name", sorted(bands()))
def test_reasoning_gym_accepts_its_answers_and_no_others(name):
    pytest.importorskip("reasoning_gym")
    pool = load_prompts(f"reasoning-gym:{name}", DataConfig(size=8))
    entries, answers = pool.column("rg_entry"), pool.column("answer")
    reward = get_reward("reasoning-gym")
    assert set(pool.column("level")) == {0, 1, 2, 3}
    forms = ("{}", "I add them up.\nAnswer: {}\n", "Hence \\boxed{{{}}}.", "  {} \n", "<answer>{}</answer>")
    for form in forms:
        scores = reward(pool.column("prompt"), [form.format(a) for a in answers], rg_entry=entries)
        assert scores == [1.0] * len(pool), form
    for wrong in ("", "no idea", "-987654321", "((", "None", "0x"):
        assert reward(pool.column("prompt"), [wrong] * len(pool), rg_entry=entries) == [0.0] * len(pool), (
            wrong
        )


def test_reasoning_gym_gives_no_partial_credit():
    pytest.importorskip("reasoning_gym")
    pool = load_prompts("reasoning-gym:chain_sum@0", DataConfig(size=4))
    near = [f"{answer} or so" for answer in pool.column("answer")]
    assert (
        get_reward("reasoning-gym")(pool.column("prompt"), near, rg_entry=pool.column("rg_entry"))
        == [0.0] * 4
    )


FORMS = {
    "box": "so \\boxed{{{}}}.",
    "same line": "I think.\nAnswer: {}",
    "next line": "Answer:\n{}\n",
    "fence": "Answer:\n```\n{}\n```\nI hope this helps.",
    "tag": "<think>2</think>\n<answer>{}</answer>",
    "tag on lines": "<answer>\n{}\n</answer>\n",
    "remark": "Answer:\n{}\n\nThis is what was asked for.",
    "bold": "**Answer:** {}",
}
GENERATORS = (  # full stops of their own, grids, grids with blank lines or underscores, plain answers
    "emoji_mystery", "sentence_reordering", "sudoku", "mini_sudoku", "futoshiki", "n_queens", "game_of_life",
    "rotate_matrix", "pool_matrix", "binary_matrix", "letter_counting", "chain_sum", "basic_arithmetic",
)  # fmt: skip


@pytest.mark.parametrize("generator", GENERATORS)
def test_answers_are_found_in_every_usual_form(generator):
    package = pytest.importorskip("reasoning_gym")
    entries = list(package.create_dataset(generator, size=2, seed=5))
    for entry in entries:
        for name, form in FORMS.items():
            assert one(form.format(entry["answer"]), rg_entry=json.dumps(entry, default=str)) == 1, name


def test_generators_that_make_all_their_questions_at_once():
    pytest.importorskip("reasoning_gym")
    pool = load_prompts("reasoning-gym:list_functions", DataConfig(size=2))
    for answer, entry in zip(pool.column("answer"), pool.column("rg_entry"), strict=True):
        assert one(f"<answer>\n{answer}\n</answer>", rg_entry=entry) == 1


def test_grids_that_a_scorer_holds_as_tuples_survive_json():
    class Source:  # as ARC's
        def score_answer(self, answer, entry):
            grid = tuple(tuple(map(int, row.split())) for row in answer.splitlines())
            return float(grid == entry["metadata"]["output"])

    text = json.dumps({"metadata": {"output": ((1, 2), (3, 4))}})
    assert score(Source(), "1 2\n3 4", text) == 1 and score(Source(), "1 2\n3 5", text) == 0


def test_a_full_stop_that_ends_a_sentence_is_no_part_of_the_answer():
    pytest.importorskip("reasoning_gym")
    pool = load_prompts("reasoning-gym:chain_sum@0", DataConfig(size=1))
    (answer,), (entry,) = pool.column("answer"), pool.column("rg_entry")
    assert one(f"Answer: {answer}.", rg_entry=entry) == 1
    assert one(f"<think>Answer: {answer}", rg_entry=entry) == 0  # what is only thought is not stated
    assert one(f"Answer: {answer}", rg_entry=entry) == 1  # nothing in this form asks for </think> ...
    scored = score_rewards(
        get_reward("reasoning-gym-think"), ["?"], [f"Answer: {answer}"], {"rg_entry": [entry]}
    )
    assert scored.tolist() == [0.0]  # ... but this one does


def test_reasoning_gym_without_entries_is_one_sentence():
    assert "'rg_entry'" in str(pytest.raises(SaerlError, one, "1").value)
    with pytest.raises(SaerlError, match="'nonsense'"):
        one("1", rg_entry="nonsense")
    pytest.importorskip("reasoning_gym")
    entry = json.dumps({"answer": "1", "metadata": {"source_dataset": "gone"}})
    with pytest.raises(SaerlError, match="unknown reasoning-gym generator 'gone'"):
        one("1", rg_entry=entry)
