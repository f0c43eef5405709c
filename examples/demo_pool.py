"""The demo's problems: ten small task families in five levels each, and the bad rows of a real pool.

Levels 1 to 4 are what the language model is pretrained and evaluated on. Level 5 stands in the pool alone
and is beyond the model: a pool collected for larger models has such rows, and training on them is wasted.

Pure Python, no dependencies, the same output for the same seed everywhere. `make_demo.py` writes the
pool and the held-out items with it, and draws the text the demo's language model is pretrained on.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

LEVELS = (1, 2, 3, 4)
TOO_HARD = 5
HELD_OUT = 5  # one problem key in HELD_OUT goes to eval.jsonl, never to the pool
LETTERS = "ABCDEGKLMNOPRST"


@dataclass(frozen=True)
class Problem:
    task: str
    level: int
    key: str  # the problem without its wording: two wordings of 3 + 4 share a key
    prompt: str
    answer: str

    @property
    def held_out(self) -> bool:
        return zlib.crc32(self.key.encode()) % HELD_OUT == 0


Fields = dict[str, object]


def _addition(rng: random.Random, level: int) -> tuple[Fields, str]:
    top_a, top_b = ((9, 4), (9, 9), (20, 9), (60, 19), (9999, 9999))[level - 1]
    a, b = rng.randint(0, top_a), rng.randint(0, top_b)
    return {"a": a, "b": b}, str(a + b)


def _subtraction(rng: random.Random, level: int) -> tuple[Fields, str]:
    top_a, top_b = ((9, 4), (12, 9), (20, 9), (60, 19), (9999, 9999))[level - 1]
    b = rng.randint(0, top_b)
    a = rng.randint(b, top_a)
    return {"a": a, "b": b}, str(a - b)


def _multiplication(rng: random.Random, level: int) -> tuple[Fields, str]:
    top_a, top_b = ((12, 4), (10, 7), (10, 10), (20, 10), (999, 99))[level - 1]
    a, b = rng.randint(1, top_a), rng.randint(1, top_b)
    return {"a": a, "b": b}, str(a * b)


def _largest(rng: random.Random, level: int) -> tuple[Fields, str]:
    count, top = ((2, 10), (3, 10), (2, 50), (4, 100), (9, 10_000))[level - 1]
    numbers = rng.sample(range(top), count)
    return {"items": ", ".join(map(str, numbers))}, str(max(numbers))


def _sorting(rng: random.Random, level: int) -> tuple[Fields, str]:
    digits = [rng.choice("123456789") for _ in range((2, 3, 4, 5, 7)[level - 1])]
    return {"items": " ".join(digits)}, "".join(sorted(digits))


def _counting(rng: random.Random, level: int) -> tuple[Fields, str]:
    letter = rng.choice(LETTERS)
    others = [rng.choice(LETTERS) for _ in range((2, 3, 5, 7, 24)[level - 1])]
    word = "".join(letter if rng.random() < 0.4 else other for other in others)
    return {"letter": letter, "word": word}, str(word.count(letter))


def _remainder(rng: random.Random, level: int) -> tuple[Fields, str]:
    ranges = (30, (2, 5, 10)), (20, (3, 4, 5)), (40, (3, 4, 6)), (99, (6, 7, 8, 9)), (9999, (37, 83, 97))
    top, divisors = ranges[level - 1]
    a, b = rng.randint(1, top), rng.choice(divisors)
    return {"a": a, "b": b}, str(a % b)


def _reversing(rng: random.Random, level: int) -> tuple[Fields, str]:
    word = "".join(rng.choice(LETTERS) for _ in range((2, 3, 4, 5, 7)[level - 1]))
    return {"word": word}, word[::-1]


def _sequence(rng: random.Random, level: int) -> tuple[Fields, str]:
    start = rng.randint(1, (60, 40, 20, 40, 999)[level - 1])
    step = rng.randint(*((1, 1), (1, 2), (1, 5), (3, 9), (97, 499))[level - 1])
    terms = [start + step * i for i in range(5)]
    if level == 4 and rng.random() < 0.5:
        terms.reverse()
    return {"items": ", ".join(map(str, terms[1:4] if level < 3 else terms[:4]))}, str(terms[4])


def _clock(rng: random.Random, level: int) -> tuple[Fields, str]:
    grid = (60, 30, 10, 5, 1)[level - 1]
    start = rng.randrange(60, 12 * 60, grid)
    minutes = rng.randrange(5, 60, 5) if level == 1 else grid * rng.randint(1, (0, 2, 3, 9, 700)[level - 1])
    end = (start + minutes - 60) % 720 + 60
    return {"time": _time(start), "minutes": minutes}, _time(end)


def _time(minutes: int) -> str:
    return f"{minutes // 60}:{minutes % 60:02d}"


TASKS: dict[str, tuple[Callable[[random.Random, int], tuple[Fields, str]], tuple[str, ...]]] = {
    "addition": (_addition, ("What is {a} plus {b}?", "{a} + {b} = ?", "Tom has {a} coins and finds {b}.")),
    "subtraction": (_subtraction, ("What is {a} minus {b}?", "{a} - {b} = ?", "Take {b} from {a}.")),
    "multiplication": (_multiplication, ("What is {a} times {b}?", "{a} * {b} = ?", "{a} bags of {b} pens.")),
    "largest": (_largest, ("Which is the largest: {items}?", "Find the maximum of {items}.")),
    "sorting": (_sorting, ("Sort the digits {items}.", "Put {items} in rising order.")),
    "counting": (_counting, ("How many {letter} are in {word}?", "Count the letter {letter} in {word}.")),
    "remainder": (_remainder, ("What is {a} mod {b}?", "Share {a} sweets by {b}. How many are left?")),
    "reversing": (_reversing, ("Reverse the word {word}.", "Write {word} backwards.")),
    "sequence": (_sequence, ("What comes next: {items}?", "Continue {items}.")),
    "clock": (
        _clock,
        ("It is {time}. What time is it in {minutes} minutes?", "Add {minutes} minutes to {time}."),
    ),
}


CELLS = [(task, level) for task in TASKS for level in LEVELS]


def draw(rng: random.Random, task: str, level: int, *, held_out: bool | None = None) -> Problem:
    """One problem of a family and level, from the held-out keys, from the others or (None) from all."""
    make, wordings = TASKS[task]
    while True:
        fields, answer = make(rng, level)
        key = f"{task} {sorted(fields.items())}"
        problem = Problem(task, level, key, rng.choice(wordings).format(**fields), answer)
        if held_out in (None, problem.held_out):
            return problem


def wrong_answer(rng: random.Random, answer: str) -> str:
    """A near miss of the same kind: off by a little, two characters exchanged, or one replaced."""
    while True:
        chars = list(answer)
        how = rng.random()
        if answer.isdigit() and how < 0.5:
            guess = str(max(0, int(answer) + rng.choice((-10, -2, -1, -1, 1, 1, 2, 10))))
        elif len(chars) > 1 and how < 0.75:
            i = rng.randrange(len(chars) - 1)
            chars[i], chars[i + 1] = chars[i + 1], chars[i]
            guess = "".join(chars)
        else:
            i = rng.choice([i for i, char in enumerate(chars) if char != ":"])
            chars[i] = rng.choice("0123456789" if chars[i].isdigit() else LETTERS)
            guess = "".join(chars)
        if guess != answer and guess[0] != ":" and (guess == "0" or not guess.startswith("0")):
            return guess


DEBRIS = ("<td>", "&nbsp;", "</p>", "\\x00", "{{0}}", "###", "NULL", "%20", "[img]", "~~", "^M", "||")
MOJIBAKE = ("Ã©", "â€", "Â", "ï¿½", "Ð", "þ", "¤", "§")


def garble(rng: random.Random, prompt: str) -> str:
    """A prompt as a broken scrape leaves it: nobody could answer it."""
    how = rng.randrange(5)
    if how == 0:  # letters in any order
        return "".join(rng.sample(prompt, len(prompt)))
    if how == 1:  # a wrong decoding
        return "".join(rng.choice(MOJIBAKE) if rng.random() < 0.3 else char for char in prompt[:28])
    if how == 2:  # most characters lost
        return "".join(char for char in prompt if rng.random() < 0.4) or "?"
    words = prompt.split()
    if how == 3:  # markup in place of the content
        return " ".join(rng.choice(DEBRIS) if rng.random() < 0.6 else word for word in words)
    rng.shuffle(words)  # a stuck buffer
    return " ".join(word[:2] * rng.randint(1, 3) for word in words[:8])


CHATTER = (
    "Tell me a joke about {thing}.",
    "Do you like {thing} or {other}?",
    "What do you think of {thing}?",
    "Write a poem on {thing} for my {person}.",
    "My {person} gave me {thing} today, lovely!",
    "Can you recommend a film about {thing}?",
    "Why is my {person} so fond of {thing}?",
    "Good morning! Let us talk about {thing}.",
    "Which is nicer, {thing} or {other}? My {person} asks.",
    "Please book {thing} for me and my {person}.",
)
THINGS = ("cats", "tea", "the weather", "football", "jazz", "old cars", "music", "rain", "the sea", "pizza")
PEOPLE = ("sister", "boss", "friend", "uncle", "teacher", "neighbour", "mother")
REPLIES = ("ok", "sure", "maybe", "yes", "no", "nice", "thanks", "hello", "later", "fun", "good", "7", "42")


def off_task(rng: random.Random) -> tuple[str, str]:
    """Chit-chat and a reply that no reward can verify."""
    thing, other = rng.sample(THINGS, 2)
    text = rng.choice(CHATTER).format(thing=thing, other=other, person=rng.choice(PEOPLE))
    return text, rng.choice(REPLIES)


def pool(role: str, size: int, seed: int, argument: str = "0.4") -> list[dict[str, object]]:
    """A source of prompts: data.train=examples/demo_pool.py:pool@0.75 is the pool with `hard` at 0.75.

    The same 2,000 rows for all sizes and seeds; examples/demo/eval.jsonl holds none of them.
    """
    return make_pool(0, hard=float(argument))


def make_pool(seed: int, size: int = 2000, labelled: int = 250, hard: float = 0.4) -> list[dict[str, object]]:
    """The training pool: 72 % clean rows, 12 % wrong answers, 8 % garbled, 8 % off-task.

    Of the rows with a problem, `hard` are of the level beyond the model, the others spread over LEVELS.
    `quality_label` is 1 (clean) or 0 for a random `labelled` rows and None elsewhere. Texts are unique.
    """
    rng = random.Random(seed)
    kinds = (
        ["wrong_answer"] * (size * 12 // 100)
        + ["garbled"] * (size * 8 // 100)
        + ["off_task"] * (size * 8 // 100)
    )
    kinds += ["clean"] * (size - len(kinds))
    rows: list[dict[str, object]] = []
    seen: set[str] = set()
    for i, kind in enumerate(kinds):
        while True:
            task, level = CELLS[i % len(CELLS)]
            if i * 0.618 % 1 < hard:  # evenly among the kinds and families
                level = TOO_HARD
            problem = draw(rng, task, level, held_out=False)
            prompt, answer = problem.prompt, problem.answer
            if kind == "wrong_answer":
                answer = wrong_answer(rng, answer)
            elif kind == "garbled":
                prompt = garble(rng, prompt)
            elif kind == "off_task":
                prompt, answer = off_task(rng)
                task, level = "chat", 0
            if prompt not in seen:
                break
        seen.add(prompt)
        rows.append({"prompt": prompt, "answer": answer, "task": task, "level": level, "kind": kind})
    rng.shuffle(rows)
    chosen = set(rng.sample(range(size), labelled))
    return [
        {
            "prompt_id": f"demo-{i:04d}",
            **row,
            "quality_label": int(row["kind"] == "clean") if i in chosen else None,
        }
        for i, row in enumerate(rows)
    ]


def make_eval(seed: int, per_cell: int = 6) -> list[dict[str, object]]:
    """Clean held-out items, `per_cell` of every family and level, each problem once, none from the pool."""
    rng = random.Random(seed + 1)
    rows: list[dict[str, object]] = []
    keys: set[str] = set()
    for task, level in CELLS * per_cell:
        item = draw(rng, task, level, held_out=True)
        while item.key in keys:
            item = draw(rng, task, level, held_out=True)
        keys.add(item.key)
        row = {"prompt": item.prompt, "answer": item.answer, "task": task, "level": level, "kind": "clean"}
        rows.append({"prompt_id": f"eval-{len(rows):03d}", **row})
    return rows


def pretraining_text(rng: random.Random, noise: float) -> tuple[str, str]:
    """One (prompt, answer) of the pretraining corpus, which like the web is full of mistakes.

    Of the tasks' answers a share `noise` is wrong; 6 % of the prompts are garbled, 6 % chit-chat.
    """
    kind = rng.random()
    if kind < 0.06:
        return off_task(rng)
    level = rng.choices(LEVELS, weights=(3, 3, 2, 2))[0]
    problem = draw(rng, rng.choice(list(TASKS)), level)
    if kind < 0.12:
        return garble(rng, problem.prompt), problem.answer
    return problem.prompt, wrong_answer(rng, problem.answer) if rng.random() < noise else problem.answer
