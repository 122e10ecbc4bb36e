"""Captions as lists of word numbers: what is said of a picture, in any order, among words that say nothing."""

import dataclasses

import numpy as np

from jkd.errors import UserError

PADDING = 0  # of captions that are shorter than others; the number of no word


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Words by number, from 1 on: those of things, of places, and distractors; 0 is padding.

    Attributes:
      things: what can be in a picture.
      places: where.
      distractors: words that say nothing.
    """

    things: tuple[str, ...]
    places: tuple[str, ...]
    distractors: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """All, padding first: word n is the n-th."""
        return ("", *self.things, *self.places, *self.distractors)

    def __len__(self) -> int:
        return len(self.words)

    def text(self, numbers: np.ndarray) -> str:
        """The caption in words."""
        words = self.words
        return " ".join(words[n] for n in np.asarray(numbers) if n != PADDING)


def write_captions(
    draw: np.random.RandomState,
    vocabulary: Vocabulary,
    things: np.ndarray,
    places: np.ndarray | None,
    *,
    captions: int,
    fewest: int,
    distractors: int,
) -> np.ndarray:
    """Captions of pictures: some of their things in random order, each followed by its place, among distractors.

    Args:
      draw: where the randomness comes from.
      vocabulary: the words.
      things: int[pictures, n], the number of each thing from 0.
      places: likewise where each is; None: captions name no places.
      captions: of each picture.
      fewest: captions name a random number of the n things, this many at least.
      distractors: captions hold a random number of them, this many at most, at random places between the things.

    Returns:
      int32[pictures, captions, length], padded with 0 at the end; the length is that of the longest possible.

    Raises:
      UserError: if a number is out of range.
    """
    count = things.shape[1]
    if captions < 1 or not 1 <= fewest <= count or distractors < 0 or (distractors and not vocabulary.distractors):
        raise UserError(
            f"Captions of {count} things need captions >= 1, fewest in [1, {count}] and distractors >= 0 of a "
            f"vocabulary that has some; got {captions}, {fewest} and {distractors} of {len(vocabulary.distractors)}."
        )
    each = 1 if places is None else 2
    written = np.full((len(things), captions, each * count + distractors), PADDING, np.int32)
    first_place = 1 + len(vocabulary.things)
    first_distractor = first_place + len(vocabulary.places)
    for i in range(len(things)):
        said = [[1 + int(thing)] for thing in things[i]]
        if places is not None:
            said = [[*word, first_place + int(place)] for word, place in zip(said, places[i], strict=True)]
        for k in range(captions):
            chosen = draw.permutation(count)[: draw.randint(fewest, count + 1)]
            noise = [
                [first_distractor + draw.randint(len(vocabulary.distractors))] for _ in range(_some(draw, distractors))
            ]
            groups = [said[n] for n in chosen] + noise
            words = [word for n in draw.permutation(len(groups)) for word in groups[n]]
            written[i, k, : len(words)] = words
    return written


def _some(draw: np.random.RandomState, most: int) -> int:
    return int(draw.randint(most + 1)) if most else 0


def check_at_least(least: int, **numbers: float | int) -> None:
    """Raises UserError unless every number is finite and at least `least`."""
    for name, value in numbers.items():
        if not (np.isfinite(value) and value >= least):
            raise UserError(f"{name} must be finite and at least {least}, got {value}.")


def names(prefix: str, count: int) -> tuple[str, ...]:
    """So many made-up words."""
    return tuple(f"{prefix}{n}" for n in range(count))
