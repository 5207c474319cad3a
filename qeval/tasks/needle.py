"""Needles in haystacks: texts of a given length, written by seed, with a code hidden at each of several depths.

Every haystack holds one needle a depth, each with a key of its own; its questions ask for one key each, and differ at
the very end alone, so that a model reads the haystack once for all of them. That is RULER's NIAH with several keys
(Hsieh et al., arXiv 2404.06654) at the depths of Kamradt's needle in a haystack; the answer is not generated but
forced, and its log-probability and rank are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from qeval.errors import UsageError
from qeval.tasks.corpus import BosPolicy
from qeval.tasks.harness_text import Encoder
from qeval.types import TokenIds

NEEDLE_TEXT_VERSION = 1
"""Raise it when the same seed writes other texts."""

_INSTRUCTION = "Some codes are hidden in the text below. Remember them all.\n\n"
_LEAST_SENTENCES = 2
"""Sentences of filler a needle: with fewer, depths would not differ."""
_NAMES = ("Ada", "Bruno", "Chen", "Dalia", "Emeka", "Freya", "Goran", "Hana", "Ivo", "Jana", "Kofi", "Lena", "Marek")
_VERBS = ("carried", "painted", "repaired", "sold", "drew", "found", "borrowed", "washed", "measured", "hid")
_THINGS = ("a ladder", "two lamps", "the old map", "a basket", "some rope", "the blue door", "a violin", "three stones")
_PLACES = ("by the river", "in the market", "behind the mill", "near the station", "under the bridge", "at the farm")
_TIMES = ("On Monday", "Last winter", "At noon", "Before the storm", "In the spring", "After the feast", "That night")
_COLORS = ("amber", "silver", "violet", "crimson", "golden", "emerald", "ivory", "scarlet", "cobalt", "copper")
_SITES = ("harbor", "tower", "garden", "museum", "castle", "library", "valley", "lighthouse", "orchard", "theater")


@dataclass(frozen=True)
class Haystack:
    """One text: `pairs` holds the prompt and the answer of each depth (0 at the start, 1 at the end), as token ids."""

    length: int
    number: int
    depths: tuple[float, ...]
    pairs: tuple[tuple[TokenIds, TokenIds], ...]


@dataclass(frozen=True)
class _Text:
    """The parts of a haystack: its filler, and the key and the code of each depth."""

    sentences: tuple[str, ...]
    needles: tuple[tuple[str, str], ...]

    def questions(self, depths: Sequence[float], count: int) -> list[tuple[str, str]]:
        """Return the prompt and the answer of every needle, with the first `count` sentences of the filler."""
        parts: list[str] = []
        places = [round(depth * count) for depth in depths]
        for place in range(count + 1):
            parts += [_said(*needle) for needle, at in zip(self.needles, places, strict=True) if at == place]
            parts += self.sentences[place : place + 1] if place < count else []
        text = _INSTRUCTION + " ".join(parts) + "\n\n"
        return [(text + _said(key, "").removesuffix(" ."), f" {code}") for key, code in self.needles]


def depths_of(count: int) -> tuple[float, ...]:
    """Return so many depths, evenly from the start to the end; one lies in the middle.

    >>> depths_of(5), depths_of(1)
    ((0.0, 0.25, 0.5, 0.75, 1.0), (0.5,))
    """
    return (0.5,) if count == 1 else tuple(place / (count - 1) for place in range(count))


def write_haystack(
    tokenizer: Any, bos: BosPolicy, length: int, number: int, depths: Sequence[float], seed: int
) -> Haystack:
    """Write the haystack of a number: as long as fits into `length` tokens, answers included.

    Args:
        tokenizer: The model's.
        bos: Whether BOS goes in front.
        length: The most tokens of a prompt and its answer.
        number: Tells haystacks of one length apart.
        depths: Where needles lie, 0 to 1.
        seed: Decides the texts.

    Raises:
        UsageError: The needles and a little text between them take more tokens.
    """
    encoder = Encoder(tokenizer, bos)
    random = Random(f"{NEEDLE_TEXT_VERSION} {seed} {length} {number}")
    text = _Text(tuple(_sentence(random) for _ in range(length)), _needles(random, len(depths)))
    least = _LEAST_SENTENCES * len(depths)
    count = max(least, _first_guess(encoder, text, depths, length))
    while True:
        pairs = encoder.pairs(text.questions(depths, count))
        beyond = max(len(prompt) + len(answer) for prompt, answer in pairs) - length
        if beyond <= 0:
            return Haystack(length, number, tuple(depths), tuple(pairs))
        if count == least:
            raise UsageError(
                f"--needle-lengths {length}: {len(depths)} needles with {least} sentences between them take "
                f"{length + beyond} tokens; give a greater length, or fewer --needle-depths."
            )
        count = max(least, count - max(1, beyond // _tokens_of(encoder, text)))


def _first_guess(encoder: Encoder, text: _Text, depths: Sequence[float], length: int) -> int:
    """Return about how many sentences fit, by the mean length of the first of them."""
    ((prompt, answer),) = encoder.pairs(text.questions(depths, 0)[:1])
    return (length - len(prompt) - len(answer)) // _tokens_of(encoder, text)


def _tokens_of(encoder: Encoder, text: _Text) -> int:
    """Return a sentence's mean tokens, rounded down so that guesses are too long rather than too short."""
    some = text.sentences[:64]
    return max(1, len(encoder.encode([" ".join(some)])[0]) // len(some))


def _sentence(random: Random) -> str:
    time, name, verb, thing, place = (random.choice(words) for words in (_TIMES, _NAMES, _VERBS, _THINGS, _PLACES))
    return f"{time} {name} {verb} {thing} {place}."


def _needles(random: Random, count: int) -> tuple[tuple[str, str], ...]:
    """Draw keys that are all different, and a code of five digits for each."""
    keys = random.sample([f"{color} {site}" for color in _COLORS for site in _SITES], count)
    codes = random.sample(range(10_000, 100_000), count)
    return tuple((key, str(code)) for key, code in zip(keys, codes, strict=True))


def _said(key: str, code: str) -> str:
    return f"The code of the {key} is {code}."
