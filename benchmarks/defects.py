"""What can be wrong with a prompt, made on purpose: every kind of defect in several ways, from a seed."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

Spoil = Callable[[str, random.Random], "str | None"]  # the defective text; None where this text allows none

TOPICS = (
    "the sea",
    "my cat",
    "old trains",
    "rain",
    "football",
    "bread",
    "jazz",
    "holidays",
    "my garden",
    "chess",
)
FORMS = (
    "Write a short poem about {0}.",
    "Which do you like better, {0} or {1}?",
    "Tell me a joke about {0} and {1}.",
    "Please draft an email to my boss about {0}.",
    "Translate 'I love {0}' into French.",
    "Summarise the history of {0}.",
    "How do I talk with my neighbour about {0}?",
    "Give me three names for a shop about {0}.",
    "Continue this story: once there was {0}, and then {1} came.",
)
SCRAPS = (
    "def main():\n    items = load('{0}.json')\n    for item in items:\n        print(item)\n",
    "Home | About | Contact | {0} | {1} | Cookie settings | Accept all | Subscribe to our newsletter",
    "Thanks everyone for the lovely comments on {0}! Next week I will write about {1}, so stay tuned.",
    "In a large bowl mix flour, sugar and two eggs. Bake for 30 minutes at 180 degrees and serve with {0}.",
    "BREAKING: officials said on Tuesday that {0} would close early this year; {1} remain open until May.",
    "Dear Sir or Madam, I am writing to complain about {0}, which arrived broken. Please send a refund.",
)
FIGURES = (
    "the value shown in the figure",
    "the length marked in the diagram",
    "the number in the table above",
    "the value read from the graph",
    "the amount given in the picture",
    "the measure shown in the drawing",
)
POINTERS = (
    "As shown in the figure, ",
    "In the figure below, ",
    "Refer to the diagram. ",
    "See the picture. ",
    "The graph is shown below. ",
    "Using the table above, ",
)
NAMES = (
    "Alice",
    "Bob",
    "Carol",
    "David",
    "Emma",
    "Frank",
    "George",
    "Helen",
    "Jack",
    "John",
    "Julia",
    "Karl",
    "Laura",
    "Maria",
    "Mary",
    "Nina",
    "Peter",
    "Sam",
    "Sarah",
    "Tom",
    "Tim",
    "Betty",
    "Charlie",
    "Cindy",
    "Jenny",
    "Jim",
    "Kim",
    "Linda",
    "Mike",
    "Paul",
    "Rachel",
    "Susan",
)
WORD = re.compile(r"[A-Za-z]{4,}")
SENTENCES = re.compile(r"(?<=[.?!])\s+(?=[A-Z$\\])")
ASKS = re.compile(
    r"\?|\b(find|compute|determine|evaluate|calculate|prove|show that|what|how many|express|solve)\b",
    re.IGNORECASE,
)


def between_words(text: str, rng: random.Random) -> str | None:
    words = text.split(" ")
    return " ".join(words[: int(len(words) * rng.uniform(0.3, 0.7))]) if len(words) >= 12 else None


def within_a_word(text: str, rng: random.Random) -> str | None:
    middle = range(int(0.3 * len(text)), int(0.8 * len(text)))
    inside = [i for i in middle if text[i - 1 : i + 1].isalpha()] if len(text) >= 60 else []
    return text[: rng.choice(inside)] if inside else None


def at_a_line(text: str, rng: random.Random) -> str | None:
    """After a line, a comma or a formula, where there is such an end past a quarter."""
    ends = [m.end() for m in re.finditer(r"\n|,(?= )|\$(?= )", text) if 0.25 < m.end() / len(text) < 0.8]
    return text[: rng.choice(ends)].rstrip() if ends and len(text) >= 60 else None


def replaced_characters(text: str, rng: random.Random) -> str | None:
    """A quarter of the characters replaced by letters, digits and signs."""
    signs = "abcdefghijklmnopqrstuvwxyz0123456789#%&@~"
    return "".join(rng.choice(signs) if rng.random() < 0.25 else c for c in text) if len(text) >= 40 else None


def shuffled_letters(text: str, rng: random.Random) -> str | None:
    """The letters within each word in another order."""
    mixed = WORD.sub(lambda m: "".join(rng.sample(m.group(), len(m.group()))), text)
    return mixed if len(WORD.findall(text)) >= 5 else None


def shuffled_words(text: str, rng: random.Random) -> str | None:
    words = text.split()
    return " ".join(rng.sample(words, len(words))) if len(words) >= 8 else None


def wrong_encoding(text: str, rng: random.Random) -> str | None:
    """A tenth of the characters as bytes of another encoding, or lost."""
    noise = ("â€™", "Ã©", "\ufffd", "Â ", "ï»¿", "Ð°", "&#39;", "\\u00e9")
    return "".join(rng.choice(noise) if rng.random() < 0.1 else c for c in text) if len(text) >= 40 else None


def request(text: str, rng: random.Random) -> str | None:
    return rng.choice(FORMS).format(*rng.sample(TOPICS, 2)) if len(text) >= 40 else None


def scrap(text: str, rng: random.Random) -> str | None:
    return rng.choice(SCRAPS).format(*rng.sample(TOPICS, 2)) if len(text) >= 40 else None


def drawing_removed(text: str, rng: random.Random) -> str | None:
    bare = re.sub(r"\s*\[asy\].*?\[/asy\]\s*", " ", text, flags=re.DOTALL).strip()
    return bare if bare and "[asy]" in text else None


def number_in_a_figure(text: str, rng: random.Random) -> str | None:
    """A number replaced by a reference to a figure that is not there."""
    numbers = [] if "[asy]" in text else [*re.finditer(r"(?<=\s)\d+(?=[\s,.?])", text)]
    if not numbers:
        return None
    chosen = rng.choice(numbers)
    return text[: chosen.start()] + rng.choice(FIGURES) + text[chosen.end() :]


def pointed_at(text: str, rng: random.Random) -> str | None:
    """A sentence that points at a figure which is not there, before what it gave."""
    parts = SENTENCES.split(text.strip())
    if len(parts) < 2 or "[asy]" in text or "figure" in text:
        return None
    parts[0] = rng.choice(POINTERS).rstrip()
    return " ".join(parts)


def last_sentence(text: str, rng: random.Random) -> str | None:
    kept = " ".join(SENTENCES.split(text.strip())[:-1])
    return kept if len(kept) >= 30 and not ASKS.search(kept) else None


def asking_sentence(text: str, rng: random.Random) -> str | None:
    """Every sentence that asks for something, wherever it stands."""
    parts = SENTENCES.split(text.strip())
    kept = " ".join(part for part in parts if not ASKS.search(part))
    return kept if len(kept) >= 30 and len(parts) >= 2 and kept != text.strip() else None


def wrong_answer(text: str, rng: random.Random) -> str | None:
    """The prompt itself: the answer beside it would be another one, which no prompt shows."""
    return text


def numbers_changed(text: str, rng: random.Random) -> str | None:
    other = re.sub(r"\d+", lambda m: str(int(m.group()[:9]) + rng.randint(1, 9)), text)
    return other if other != text else None


def names_changed(text: str, rng: random.Random) -> str | None:
    """Another first name for every first name; where there is none, other letters for points."""
    found = sorted({word for word in re.findall(r"\b[A-Z][a-z]+\b", text) if word in NAMES})
    if not found and re.search(r"\b[ABC]{2,3}\b", text):
        return re.sub(r"\b[ABCD]{2,4}\b", lambda m: m.group().translate(str.maketrans("ABCD", "PQRS")), text)
    other = dict(zip(found, rng.sample(sorted(set(NAMES) - set(found)), len(found)), strict=True))
    return re.sub(r"\b[A-Z][a-z]+\b", lambda m: other.get(m.group(), m.group()), text) if found else None


def respaced(text: str, rng: random.Random) -> str | None:
    """Other spaces, lines and case."""
    spaced = re.sub(r" ", lambda m: rng.choice([" ", "  ", "\n", " "]), text)
    spaced = rng.choice([str.upper, str.lower, str])(spaced) if "\\" not in spaced else spaced + " \n"
    return spaced if spaced != text else None


def numbers_and_names(text: str, rng: random.Random) -> str | None:
    named = names_changed(text, rng)
    return numbers_changed(named, rng) if named else None


DEFECTS: dict[str, tuple[Spoil, ...]] = {
    "truncated": (between_words, within_a_word, at_a_line),
    "garbled": (replaced_characters, shuffled_letters, shuffled_words, wrong_encoding),
    "off_topic": (request, scrap),
    "figure_missing": (drawing_removed, number_in_a_figure, pointed_at),
    "question_removed": (last_sentence, asking_sentence),
    "wrong_answer": (wrong_answer,),
}
COPIES: dict[str, Spoil] = {
    "spaces and case": respaced,
    "numbers changed": numbers_changed,
    "names changed": names_changed,
    "numbers and names": numbers_and_names,
}
