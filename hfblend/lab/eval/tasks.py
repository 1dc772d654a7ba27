"""Generated questions, after RULER: needles with several keys, values or queries, and the tracking of variables.

A question hides sentences, its needles, among filler sentences, each needle in another passage. So a variable's
definition is in another chunk than that of the variable it refers to. All text is drawn by a seeded generator from the
words below: the same name, seed, length and tokenizer give the same questions, and question i is the same however many
are generated.

Source: RULER, arXiv 2404.06654, section 3, with its numbers of keys, values and queries. Sentences and words are ours;
values have five digits instead of seven; variables form two chains, of which one is asked for. As there, the answer's
opening restates the question.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import Any

from ...prompts.tokenize import Encoder
from .data import GENERATED_NAMES, NEEDLES, Example, passage_text, prompt_of

PASSAGE_TOKENS = 400  # about; fewer where there would be less passages than needles
NUM_NEEDLES = 4  # keys, values and queries
NUM_CHAINS, CHAIN_LENGTH = 2, 4

_ADJECTIVES, _NOUNS, _VERBS, _PLACES = map(
    str.split,
    (
        "amber ancient bitter broken calm clever copper crooked distant dusty empty faded gentle golden hidden hollow "
        "humble ivory narrow patient quiet rusty silver slender sturdy velvet weary wooden",
        "anchor barrel basket bridge candle castle cottage engine falcon fountain garden hammer harbor kettle ladder "
        "lantern market mirror orchard painter river saddle shepherd tunnel valley violin wagon willow",
        "leans rests returns shines sleeps stands turns vanishes waits wanders",
        "above against before below beyond near",
    ),
)
_CONSONANTS = "BCDFGHJKLMNPQRSTVWXZ"


@dataclass(frozen=True)
class _Puzzle:
    """A question, the opening of its answer, all answers, and the needles in the order in which they must stand."""

    question: str
    opening: str
    answers: list[str]
    needles: list[str]


def generate(name: str, count: int, tokenizer: Any, tokens: int, seed: int = 0) -> list[Example]:
    """Returns the first questions of a task; their prompts have `tokens` tokens, or a few less.

    >>> examples = generate("variable_tracking", 40, tokenizer, tokens=4096)  # doctest: +SKIP

    Args:
        name: of `GENERATED_NAMES`.

    Raises:
        ValueError: the needles do not fit into so few tokens.
    """
    make = dict(zip(GENERATED_NAMES, (_multikey, _multivalue, _multiquery, _variable_tracking), strict=True))[name]
    draws = [Random(f"{name} {seed} {i}") for i in range(count)]
    return [_example(make(random), random, tokenizer, tokens) for random in draws]


# --- puzzles ----------------------------------------------------------------------------------------------------------


def _multikey(random: Random) -> _Puzzle:
    """Asks for the value of one key among several."""
    keys, values = _keys(random, NUM_NEEDLES), _values(random, NUM_NEEDLES)
    needles = random.sample([*map(_needle, keys, values)], NUM_NEEDLES)
    asked = f"access code of the {keys[0]}"
    return _Puzzle(f"What is the {asked}?", f"The {asked} is", values[:1], needles)


def _multivalue(random: Random) -> _Puzzle:
    """Asks for all values of one key."""
    (key,), values = _keys(random, 1), _values(random, NUM_NEEDLES)
    asked = f"{NUM_NEEDLES} access codes of the {key}"
    return _Puzzle(
        f"What are all {asked}?", f"The {asked} are the numbers", values, [_needle(key, value) for value in values]
    )


def _multiquery(random: Random) -> _Puzzle:
    """Asks for the values of several keys at once."""
    keys, values = _keys(random, NUM_NEEDLES), _values(random, NUM_NEEDLES)
    needles = random.sample([*map(_needle, keys, values)], NUM_NEEDLES)
    asked = f"access codes of {', '.join(f'the {key}' for key in keys)}"
    return _Puzzle(f"What are the {asked}?", f"The {asked} are the numbers", values, needles)


def _variable_tracking(random: Random) -> _Puzzle:
    """Asks for the variables that have a value, each defined by the one before it; the other chain has another value.

    Variable KQZWT = 48213.    Variable PLMNB = KQZWT.    Variable HJXRC = PLMNB.
    """
    values, names = _values(random, NUM_CHAINS), _variables(random, NUM_CHAINS * CHAIN_LENGTH)
    chains = [names[i::NUM_CHAINS] for i in range(NUM_CHAINS)]
    left = [_definitions(value, chain) for value, chain in zip(values, chains)]
    turns = random.sample([*range(NUM_CHAINS)] * CHAIN_LENGTH, len(names))  # each chain stays in order
    return _Puzzle(
        f"Which {CHAIN_LENGTH} variables have the value {values[0]}, directly or through another variable?",
        f"The {CHAIN_LENGTH} variables that have the value {values[0]} are: variable",
        chains[0],
        [next(left[chain]) for chain in turns],
    )


def _needle(key: str, value: str) -> str:
    return f"One access code of the {key} is {value}."


def _definitions(value: str, chain: list[str]) -> Iterator[str]:
    return (f"Variable {name} = {defined_by}." for defined_by, name in pairwise([value, *chain]))


def _keys(random: Random, count: int) -> list[str]:
    pairs = zip(random.sample(_ADJECTIVES, count), random.sample(_NOUNS, count))
    return [f"{adjective} {noun}" for adjective, noun in pairs]


def _values(random: Random, count: int) -> list[str]:
    return [str(value) for value in random.sample(range(10_000, 100_000), count)]


def _variables(random: Random, count: int) -> list[str]:
    base = len(_CONSONANTS)
    numbers = random.sample(range(base**5), count)
    return ["".join(_CONSONANTS[number // base**i % base] for i in range(5)) for number in numbers]


# --- passages ---------------------------------------------------------------------------------------------------------


def _example(puzzle: _Puzzle, random: Random, tokenizer: Any, tokens: int) -> Example:
    """The puzzle with its needles in different passages, in their order, as long as `tokens` allow."""
    example = Example(puzzle.question, tuple(puzzle.answers), (_filler(random),), NEEDLES, puzzle.opening)
    prompt, encode = prompt_of(tokenizer, example), Encoder(tokenizer)
    room = tokens - (len(prompt) - len(prompt.chunk_ids[0]))
    count = max(len(puzzle.needles), room // PASSAGE_TOKENS)
    places = sorted(random.sample(range(count), len(puzzle.needles)))
    hidden = dict(zip(places, puzzle.needles))

    def fits(text: str) -> bool:
        return len(encode.plain(passage_text(text))) <= room // count

    passages = [_passage(hidden.get(i, ""), random, fits, room // count // 4) for i in range(count)]
    if not all(passages):
        raise ValueError(
            f"{tokens} tokens are too few for {count} passages and {puzzle.question!r}; raise max_context."
        )
    return replace(example, passages=tuple(passages))


def _passage(needle: str, random: Random, fits: Callable[[str], bool], most: int) -> str:
    """A needle, or nothing, anywhere among as many filler sentences as fit, at most `most`; empty if none fits."""
    filler, place = [_filler(random) for _ in range(most)], random.random()

    def text(count: int) -> str:
        at = int(place * (count + 1))
        return " ".join(filter(None, [*filler[:at], needle, *filler[at:count]]))

    fitting = bisect(range(most + 1), False, key=lambda count: not fits(text(count)))
    return text(fitting - 1) if fitting else ""


def _filler(random: Random) -> str:
    first, second = _keys(random, 2)
    return f"The {first} {random.choice(_VERBS)} {random.choice(_PLACES)} the {second}."
