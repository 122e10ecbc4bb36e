"""Text for sets that have classes but no captions: words that belong to each class, drawn at random."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jkd.data.seeding import random_state
from jkd.errors import UserError, unknown

# For each class in the order of its labels: its name and words that go with it. Some classes share words, as the
# things themselves do.
WORDS: dict[str, tuple[str, ...]] = {
    "fashion_mnist": (
        "shirt tee top cotton casual sleeves jersey summer",
        "trousers pants slacks legs denim jeans waist belt",
        "pullover sweater jumper wool knitted warm sleeves winter",
        "dress gown skirt evening elegant woman long silk",
        "coat jacket overcoat winter warm outerwear buttons collar",
        "sandal shoe heel strap summer open footwear beach",
        "shirt blouse collar buttons sleeves cotton formal office",
        "sneaker shoe trainer running sport laces footwear rubber",
        "bag handbag purse backpack leather handle strap carry",
        "boot ankle shoe leather heel footwear winter zipper",
    ),
    "digits": (
        "zero nought nothing round",
        "one single alone straight",
        "two pair double couple",
        "three triple trio third",
        "four quarter square fourth",
        "five fifth hand fingers",
        "six sixth half-dozen dice",
        "seven seventh week lucky",
        "eight eighth octopus twice",
        "nine ninth almost ten",
    ),
}


class Captions(NamedTuple):
    """Texts, and which of them belongs to each example.

    Attributes:
      texts: the distinct ones, those of class 0 first.
      chosen: int32[N].
    """

    texts: list[str]
    chosen: np.ndarray


def label_captions(name: str, labels: np.ndarray, *, variants: int = 20, words: int = 3, seed: int = 0) -> Captions:
    """Gives every example one of its class's texts: no captions of what is in the image, but of its label.

    A text is `words` different words of the class in random order. Each class has `variants` texts, and an example has
    one of them, drawn independently of its image: what the two sides of a pair share is the class alone.

    Args:
      name: of WORDS.
      labels: int[N].
      variants: texts a class, at least 1.
      words: of a text, at least 1 and at most what a class has.
      seed: decides everything.

    Raises:
      UserError: for another name, or numbers out of range.
    """
    if name not in WORDS:
        raise unknown("set with words for its classes", name, WORDS)
    classes = [each.split() for each in WORDS[name]]
    if variants < 1 or not 1 <= words <= min(map(len, classes)):
        raise UserError(
            f"variants must be >= 1 and words in [1, {min(map(len, classes))}] for {name!r}, got {variants}, {words}."
        )
    texts = [
        _text(own, random_state(f"caption {name} {k}", seed, i), words)
        for k, own in enumerate(classes)
        for i in range(variants)
    ]
    drawn = random_state(f"captions {name}", seed).randint(variants, size=len(labels))
    return Captions(texts, (np.asarray(labels) * variants + drawn).astype(np.int32))


def _text(words: Sequence[str], draw: np.random.RandomState, count: int) -> str:
    return " ".join(words[i] for i in draw.permutation(len(words))[:count])
