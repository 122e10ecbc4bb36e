"""Pictures with captions for embeddings of both: procedural scenes, and collages of real digits."""

from typing import NamedTuple

import numpy as np

from jkd.data.dataset import Dataset
from jkd.data.examples import Examples, from_columns
from jkd.data.seeding import random_state
from jkd.data.vocabulary import PADDING, Vocabulary, check_at_least, names, write_captions
from jkd.errors import UserError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CORNERS = ("topleft", "topright", "bottomleft", "bottomright")


class Captioned(NamedTuple):
    """Pictures with captions.

    Attributes:
      examples: with the columns "image" (float32 features or uint8 pixels), "words" int32[N, captions, length] padded
        with 0, "mask" bool likewise, "things" and "places" int32[N, n], and "label", the first thing.
      vocabulary: what the words mean.
    """

    examples: Examples
    vocabulary: Vocabulary


def make_scenes(
    count: int,
    seed: int,
    *,
    grid: int = 4,
    objects: int = 3,
    types: int = 12,
    features: int = 16,
    noise: float | int = 0.1,
    captions: int = 5,
    fewest: int = 2,
    distractors: int = 3,
    distractor_words: int = 10,
) -> Captioned:
    """Makes scenes of objects on a grid, as feature maps, and captions of them: no real data.

    Different cells of the grid hold objects of different types. Every cell is a vector: the one-hot type of what is in
    it (zeros for nothing), and four numbers that say where it is (sine and cosine of half a turn down and across), with
    Gaussian noise on all. A caption names `fewest` to `objects` of them in random order, each followed by the word for
    its cell, among distractors.

    Args:
      count: scenes.
      seed: decides everything.
      grid: cells a side.
      objects: in a scene, at most the cells and the types.
      types: of objects.
      features: of a cell, at least types + 4; the rest is noise.
      noise: its standard deviation.
      captions: of a scene.
      fewest: objects that a caption names.
      distractors: in a caption, at most.
      distractor_words: how many there are.

    Raises:
      UserError: if a number is out of range.
    """
    check_at_least(1, count=count, grid=grid, objects=objects, types=types)
    check_at_least(0, noise=noise, distractor_words=distractor_words)
    if objects > min(grid * grid, types) or features < types + 4:
        raise UserError(
            f"Scenes need objects <= grid * grid and <= types, and features >= types + 4; got objects={objects}, "
            f"grid={grid}, types={types}, features={features}."
        )
    draw = random_state("scenes", seed)
    things = _distinct(draw, count, types, objects)
    cells = _distinct(draw, count, grid * grid, objects)
    maps = noise * draw.standard_normal((count, grid * grid, features))
    maps[np.arange(count)[:, None], cells, things] += 1
    turns = np.pi * np.stack(np.divmod(np.arange(grid * grid), grid), -1) / max(grid - 1, 1)
    maps[:, :, types : types + 4] += np.concatenate([np.sin(turns), np.cos(turns)], -1)
    vocabulary = Vocabulary(names("object", types), names("cell", grid * grid), names("word", distractor_words))
    said = {"captions": captions, "fewest": fewest, "distractors": distractors}
    words = write_captions(draw, vocabulary, things, cells, **said)
    image = maps.reshape(count, grid, grid, features)
    return _captioned("scenes", image, words, things, cells, vocabulary)


def make_collages(
    digits: Dataset,
    count: int,
    seed: int,
    *,
    places: bool = True,
    captions: int = 5,
    fewest: int = 3,
    distractors: int = 3,
    distractor_words: int = 10,
) -> Captioned:
    """Makes collages of 2 x 2 pictures of digits, and captions that name them: real pixels, made-up texts.

    A caption names `fewest` to 4 digits in random order, each followed by the word for its corner, among distractors.

    Args:
      digits: pictures of ten classes.
      count: collages; their pictures are drawn with replacement.
      seed: decides everything.
      places: whether captions name the corners.
      captions: of a collage.
      fewest: digits that a caption names.
      distractors: in a caption, at most.
      distractor_words: how many there are.

    Raises:
      UserError: if a number is out of range, or there are not ten classes.
    """
    check_at_least(1, count=count)
    check_at_least(0, distractor_words=distractor_words)
    if digits.num_classes != len(DIGITS):
        raise UserError(f"Collages are of ten digits; {digits.name!r} has {digits.num_classes} classes.")
    draw = random_state("collages", seed)
    rows = draw.randint(len(digits), size=(count, 4))
    found = digits.read(rows.reshape(-1))
    height, width, channels = digits.shape
    tiles = found["image"].reshape(count, 2, 2, height, width, channels)
    image = tiles.swapaxes(2, 3).reshape(count, 2 * height, 2 * width, channels)
    things = found["label"].reshape(count, 4)
    corners = np.broadcast_to(np.arange(4), things.shape)
    vocabulary = Vocabulary(DIGITS, CORNERS, names("word", distractor_words))
    said = {"captions": captions, "fewest": fewest, "distractors": distractors}
    words = write_captions(draw, vocabulary, things, corners if places else None, **said)
    return _captioned(f"collages of {digits.name}", image, words, things, corners, vocabulary)


def _distinct(draw: np.random.RandomState, count: int, of: int, size: int) -> np.ndarray:
    """`size` different numbers below `of`, for each of `count` rows."""
    return np.argsort(draw.random_sample((count, of)), axis=1, kind="stable")[:, :size].astype(np.int32)


def _captioned(
    name: str, image: np.ndarray, words: np.ndarray, things: np.ndarray, places: np.ndarray, vocabulary: Vocabulary
) -> Captioned:
    columns = {"image": image, "words": words, "mask": words != PADDING, "things": things, "places": places}
    classes = len(vocabulary.things)
    return Captioned(from_columns(columns | {"label": things[:, 0]}, name=name, num_classes=classes), vocabulary)
